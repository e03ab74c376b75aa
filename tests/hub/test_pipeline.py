"""Whole folders: ours against diffusers, in both directions."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as folders
from tiny_pipelines import PROMPTS

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import adapters, functions, pipeline, safetensors, tables, text, weights
from smart_grpo_jax.hub.scheduler import Scheduler
from smart_grpo_jax.models import lora
from smart_grpo_jax.models.presets import preset

T5 = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """SD3.5-M shaped, without T5."""
    return folders.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=list(folders.SHAPES))
def shaped(request, tmp_path_factory):
    """A folder of each shape."""
    return request.param, folders.write(tmp_path_factory.mktemp(request.param), request.param, seed=1)


def in_diffusers(root, **options):
    """The folder as diffusers loads it."""
    import diffusers

    name = json.loads((root / "model_index.json").read_text())["_class_name"]
    if name == "StableDiffusion3Pipeline" and not (root / "text_encoder_3").is_dir():
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = getattr(diffusers, name).from_pretrained(root, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(tiny, oracle):
    return in_diffusers(tiny)


def noise(pipe, n, size=None):
    return np.random.default_rng(3).standard_normal((n, *pipe.latent_shape(size))).astype(np.float32)


def packed(x):
    """FLUX's tokens of 2×2 latents, features (c, row, column)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h * w // 4, 4 * c)


@pytest.mark.torch
def test_a_folder_of_every_shape_gives_the_images_of_diffusers(shaped, oracle):
    name, root = shaped
    pipe, theirs = pipeline.load_pipeline(root, t5_length=T5), in_diffusers(root)
    flux = pipe.family.name == "FluxPipeline"
    assert flux == (name in ("flux", "schnell"))
    full = pipe.encode(PROMPTS)
    if flux:
        tokens, pooled, _ = theirs.encode_prompt(PROMPTS, None, max_sequence_length=T5)
    else:
        tokens, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, max_sequence_length=T5)
    oracle.assert_close(full.tokens, tokens, 1e-5)
    oracle.assert_close(full.pooled, pooled, 1e-5)
    size = (8, 20) if flux or name == "all-dual" else (6, 10)
    x = noise(pipe, 3, size)
    ours = pipe.sample(PROMPTS, latents=x, num_steps=8, guidance=4.5)
    given = oracle.torch(packed(x)) if flux else oracle.torch(x).permute(0, 3, 1, 2)
    images = theirs(
        PROMPTS,
        latents=given,
        num_inference_steps=8,
        guidance_scale=4.5,
        max_sequence_length=T5,
        height=size[0],
        width=size[1],
        output_type="pt",
    ).images.permute(0, 2, 3, 1)
    assert ours.shape == (3, *size, 3)
    assert float(images.std()) > 0.05
    oracle.assert_close(ours, images, 5e-5)  # float32 over 8 guided steps and the decoder


@pytest.mark.torch
@pytest.mark.parametrize("name", ["sd35-large", "flux"])
def test_bfloat16_and_sharded_files_with_decoys_beside_them_load(name, tmp_path, oracle):
    import torch

    root = folders.write(tmp_path / "p", name)
    theirs = in_diffusers(root, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert list((tmp_path / "q" / "transformer").glob("*.index.json"))
    for folder in ("transformer", "vae", "text_encoder"):
        for path in list((tmp_path / "q" / folder).glob("*.safetensors")):
            decoy = path.with_name(f"{path.name.split('.')[0].split('-0')[0]}.fp16.safetensors")
            safetensors.write(decoy, {"decoy": np.zeros(3, np.float16)})
    exact = pipeline.load_pipeline(root, t5_length=9)
    rounded = pipeline.load_pipeline(tmp_path / "q", t5_length=9)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a, jnp.bfloat16), np.asarray(b, jnp.bfloat16)),
        exact.params,
        rounded.params,
    )
    low = pipeline.load_pipeline(tmp_path / "q", dtype="bfloat16", t5_length=9)
    x, t, cond = noise(low, 2, 8), jnp.array([0.9, 0.3]), exact.encode(PROMPTS[:2])
    guidance = 3.5 if low.transformer.embeds_guidance else None
    v, want = (np.asarray(p.velocity(x, t, cond, guidance)) for p in (low, rounded))
    assert np.sqrt(np.mean((v - want) ** 2) / np.mean(want**2)) < 0.02  # bfloat16 keeps 8 bits
    assert not np.array_equal(v, want)


def test_the_encoders_are_dropped_where_text_is_not_asked_for(tiny):
    pipe = pipeline.load_pipeline(tiny, text=False)
    assert set(pipe.params) == {"transformer", "vae"}
    with pytest.raises(UserError, match="text encoders are not loaded"):
        pipe.encode(PROMPTS)


def test_a_fingerprint_follows_what_decides_an_embedding(tiny, tmp_path):
    base = text.text_fingerprint(tiny, "float32", 9)
    assert base == text.text_fingerprint(shutil.copytree(tiny, tmp_path / "a"), "float32", 9)
    assert base != text.text_fingerprint(tiny, "bfloat16", 9)
    assert base != text.text_fingerprint(tiny, "float32", 10)
    (tmp_path / "a" / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert base != text.text_fingerprint(tmp_path / "a", "float32", 9)
    assert base != text.text_fingerprint(folders.write(tmp_path / "b", seed=5), "float32", 9)
    transformer = damaged(tiny, tmp_path / "c", "transformer/config.json", {"sample_size": 4})
    assert base == text.text_fingerprint(transformer, "float32", 9)


def test_flux_takes_its_guidance_as_a_number(tmp_path):
    pipe = pipeline.load_pipeline(folders.write(tmp_path, "flux"), t5_length=9)
    x, t, cond = noise(pipe, 2, 8), jnp.array([0.9, 0.4]), pipe.encode(PROMPTS[:2])
    low, high = (pipe.velocity(x, t, cond, guidance) for guidance in (1.0, 5.0))
    assert np.abs(low - high).max() > 1e-3
    params = {"params": pipe.params["transformer"]}
    np.testing.assert_array_equal(jax.jit(pipe.guided(pipe.velocity_fn(), 5.0))(params, x, t, cond), high)
    assert [pipe.calls(g) for g in (1.0, 5.0)] == [1, 1]
    with pytest.raises(UserError, match="guidance"):
        pipe.velocity(x, t, cond)
    with pytest.raises(UserError, match="negative prompt"):
        pipe.sample(PROMPTS[:2], num_steps=1, negative="ugly", size=8)


def test_schnell_knows_no_guidance(tmp_path):
    pipe = pipeline.load_pipeline(folders.write(tmp_path, "schnell"), t5_length=9)
    x = noise(pipe, 1, 8)
    first, second = (pipe.sample(PROMPTS[:1], latents=x, num_steps=2, guidance=g) for g in (1.0, 5.0))
    np.testing.assert_array_equal(first, second)
    with pytest.raises(UserError, match="no input of FluxTransformer2DModel"):
        pipe.velocity(x, jnp.ones(1), pipe.encode(PROMPTS[:1]), 3.5)


@pytest.mark.torch
@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 4.5])
def test_the_shipped_pipeline_loads_in_diffusers_and_gives_the_same_images(oracle, guidance):
    theirs = in_diffusers(pipeline.pipeline_folder("shapes"))
    pipe = pipeline.load_pipeline("shapes")
    prompts = ["a photo of a red circle", "a photo of three blue triangles"]
    x = noise(pipe, 2)
    ours = pipe.sample(prompts, latents=x, num_steps=8, guidance=guidance)
    side = ours.shape[1]
    images = theirs(
        prompts,
        latents=oracle.torch(x).permute(0, 3, 1, 2),
        num_inference_steps=8,
        guidance_scale=guidance,
        max_sequence_length=pipe.t5_length,
        height=side,
        width=side,
        output_type="pt",
    ).images
    error = np.abs(ours - images.permute(0, 2, 3, 1).numpy()).max()
    assert error < 1e-3  # float32 over 8 guided steps and a decoder that sharpens edges


@pytest.mark.torch
def test_a_folder_written_by_diffusers_loads_to_the_same_parameters(tiny, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, again = pipeline.load_pipeline(tiny), pipeline.load_pipeline(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, dict(ours.params), dict(again.params))
    np.testing.assert_array_equal(ours.encode(PROMPTS).tokens, again.encode(PROMPTS).tokens)
    assert (ours.transformer, ours.vae) == (again.transformer, again.vae)
    assert ours.text.configs == again.text.configs


def test_compact_conditioning_gives_the_same_velocity(tiny):
    pipe = pipeline.load_pipeline(tiny, t5_length=T5)
    x, t = noise(pipe, 3), jnp.array([0.9, 0.5, 0.1])
    full, compact = pipe.encode(PROMPTS), pipe.encode(PROMPTS, compact=True)
    assert (full.tokens.shape[1], compact.tokens.shape[1], compact.repeats) == (14 + T5, 15, T5)
    np.testing.assert_allclose(pipe.velocity(x, t, full), pipe.velocity(x, t, compact), atol=1e-5)


def test_guidance_extrapolates_from_the_negative_prompt(tiny):
    pipe = pipeline.load_pipeline(tiny)
    x, t = noise(pipe, 2), jnp.array([0.9, 0.4])
    cond, negative = pipe.encode(PROMPTS[:2], compact=True), pipe.encode([""], compact=True)
    raw = pipe.velocity_fn()
    params = {"params": pipe.params["transformer"], "lora": {}, "negative": negative}
    got = jax.jit(functions.guided(raw, 3.0))(params, x, t, cond)
    with_prompt = pipe.velocity(x, t, cond)
    without = pipe.velocity(x, t, negative.rows(jnp.zeros(2, int)))
    np.testing.assert_allclose(got, without + 3.0 * (with_prompt - without), atol=1e-5)
    assert functions.guided(raw, 1.0) is raw


def test_images_survive_their_latents_shapes(tiny):
    pipe = pipeline.load_pipeline(tiny)
    images = np.random.default_rng(0).uniform(size=(2, 6, 6, 3)).astype(np.float32)
    x0 = pipe.encode_images(images)
    assert x0.shape == (2, *pipe.latent_shape())
    out = pipe.decode(x0)
    assert out.shape == images.shape and out.dtype == jnp.float32
    assert 0 <= out.min() and out.max() <= 1


def test_adapters_travel_through_a_file(tiny, tmp_path):
    pipe = pipeline.load_pipeline(tiny)
    module, spec, *inputs = pipe.adapter(3, 6.0)
    tree = lora.init_lora(jax.random.key(0), module, spec, *inputs)
    tree = jax.tree.map(lambda a: a + 0.1, tree)
    tensors = adapters.to_tensors(pipe.weights_table, pipe.transformer, tree, spec.scale)
    safetensors.write(tmp_path / adapters.FILE, tensors)
    folded = pipeline.load_pipeline(tiny, lora=tmp_path)
    x, t, cond = noise(pipe, 2), jnp.array([0.9, 0.4]), pipe.encode(PROMPTS[:2])
    params = {"params": pipe.params["transformer"], "lora": tree}
    adapted = jax.jit(pipe.velocity_fn(3, 6.0))(params, x, t, cond)
    np.testing.assert_allclose(folded.velocity(x, t, cond), adapted, rtol=1e-4, atol=1e-5)
    assert np.abs(adapted - pipe.velocity(x, t, cond)).max() > 1e-2


def test_dynamic_shift_follows_the_number_of_image_tokens(tiny):
    pipe = pipeline.load_pipeline(tiny)
    np.testing.assert_allclose(pipe.times(10)[[0, 1, -2, -1]], [1.0, 0.96013, 0.008929, 0.0], atol=1e-5)
    dynamic = dataclasses.replace(pipe, scheduler=Scheduler(use_dynamic_shifting=True, max_shift=1.15))
    mu = 0.5 + (9 - 256) * 0.65 / (4096 - 256)
    u = np.linspace(1, 0.001, 10)[5]
    np.testing.assert_allclose(dynamic.times(10)[5], np.exp(mu) / (np.exp(mu) + 1 / u - 1), rtol=1e-5)


@pytest.mark.parametrize("size", [7, (6, 0), 12])
def test_a_size_that_does_not_fit_is_refused(tiny, size):
    with pytest.raises(UserError, match="wanted multiples of 2 pixels, at most 10"):
        pipeline.load_pipeline(tiny).latent_shape(size)


def damaged(tiny, tmp_path, name, change):
    shutil.copytree(tiny, tmp_path / "p")
    file = tmp_path / "p" / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return tmp_path / "p"


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "wanted a FluxTransformer2DModel"),
        ("model_index.json", {"_class_name": "WanPipeline"}, "WanPipeline"),
        ("model_index.json", {"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "AsymmetricAutoencoderKL"),
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
        ("transformer/config.json", {"num_layers": 4}, "lacks 'transformer_blocks.2.attn.to_add_out"),
        ("transformer/config.json", {"num_layers": 2}, "transformer_blocks"),
        ("transformer/config.json", {"pooled_projection_dim": 9}, "has shape"),
        ("vae/config.json", {"use_quant_conv": True}, "quant_conv"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(tiny, tmp_path, file, change, match):
    with pytest.raises(UserError, match=match):
        pipeline.load_pipeline(damaged(tiny, tmp_path, file, change))


def test_a_listed_t5_without_weights_is_absent(tiny, tmp_path):
    root = damaged(tiny, tmp_path, "model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"]})
    assert pipeline.load_pipeline(root).text.t5 is None


def test_another_class_where_t5_should_be_is_refused(tiny, tmp_path):
    root = damaged(
        tiny, tmp_path, "model_index.json", {"text_encoder_3": ["transformers", "UMT5EncoderModel"]}
    )
    (root / "text_encoder_3").mkdir()
    shutil.copy(
        root / "vae" / "diffusion_pytorch_model.safetensors", root / "text_encoder_3" / "model.safetensors"
    )
    with pytest.raises(UserError, match="UMT5EncoderModel, wanted a T5EncoderModel"):
        pipeline.load_pipeline(root)


MEDIUM, FLUX_DEV = preset("sd35-medium"), preset("flux-dev")

SIZES = {
    "sd35-medium": (weights.MMDIT, MEDIUM["transformer"], 2_243_171_520, 909),
    "sd35-large": (weights.MMDIT, preset("sd35-large")["transformer"], 8_056_627_520, 1227),
    "flux-dev": (weights.FLUX, FLUX_DEV["transformer"], 11_901_408_320, 1160),
    "vae": (weights.VAE, MEDIUM["vae"], 83_819_683, 244),
    "clip-l": (weights.CLIP_TEXT, MEDIUM["text_encoder"], 123_650_304, 197),
    "clip-l of flux": (weights.CLIP_TEXT, FLUX_DEV["text_encoder"], 123_060_480, 196),
    "clip-g": (weights.CLIP_TEXT, MEDIUM["text_encoder_2"], 694_659_840, 517),
    "t5-xxl": (weights.T5, FLUX_DEV["text_encoder_2"], 4_762_310_656, 219),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_of_the_published_files_has_its_place(name):
    table, config, parameters, tensors = SIZES[name]
    places = list(tables.places(table, config))
    learned = [p for p in places if p.path != "pos_embed/pos_embed"]
    assert sum(int(np.prod(p.shape)) * len(p.keys) for p in learned) == parameters
    keys = [key for p in places for key in p.keys]
    assert len(set(keys)) == len(keys) == tensors


@pytest.mark.torch
@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_of_the_published_sizes_are_those_of_the_published_classes(name):
    import torch

    table, config, _, _ = SIZES[name]
    with torch.device("meta"):
        module = published_class(table, config)
    theirs = {k: tuple(v.shape) for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    theirs.pop("encoder.embed_tokens.weight", None)  # T5's second name of `shared.weight`
    ours = {key: p.transform.published(p.shape) for p in tables.places(table, config) for key in p.keys}
    assert ours == {table.canonical(k): v for k, v in theirs.items()}


def published_class(table, config):
    import diffusers
    import transformers

    data = dataclasses.asdict(config)
    if table is weights.T5:
        return transformers.T5EncoderModel(transformers.T5Config(**data, feed_forward_proj="gated-gelu"))
    if table is weights.CLIP_TEXT:
        kind = "CLIPTextModelWithProjection" if data.pop("projection") else "CLIPTextModel"
        return getattr(transformers, kind)(transformers.CLIPTextConfig(**data))
    if table is weights.VAE:
        stages = len(config.block_out_channels)
        data |= {"down_block_types": ["DownEncoderBlock2D"] * stages}
        data |= {"up_block_types": ["UpDecoderBlock2D"] * stages}
    return getattr(diffusers, table.name)(**data)
