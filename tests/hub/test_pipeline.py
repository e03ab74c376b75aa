"""Whole folders: ours against diffusers, in both directions."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import adapters, pipeline, tables
from smart_grpo_jax.hub.folder import COMPONENTS
from smart_grpo_jax.models import lora
from smart_grpo_jax.models.presets import PRESETS, preset
from smart_grpo_jax.worlds.shapes import vocabulary

WORDS = ["a", "red", "circle", "above", "blue", "square", "two", "green"]
PROMPTS = ["a red circle", "two green square above a blue circle!", ""]
T5 = 40


def random_tree(shapes, rng):
    def leaf(s):
        fan = np.prod(s.shape[:-1]) if len(s.shape) > 1 else 25
        return (rng.standard_normal(s.shape) / np.sqrt(max(fan, 1))).astype(np.float32)

    return jax.tree.map(leaf, shapes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny random pipeline, written by `save_pipeline`."""
    root, rng, parts = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0), {}
    for name, config in preset("tiny").items():
        table = next(iter(COMPONENTS[name].classes.values()))[0]
        parts[name] = (PRESETS["tiny"][name], random_tree(table.abstract(config), rng))
    tokenizers = {
        "tokenizer": vocabulary.files(WORDS, vocabulary.END),
        "tokenizer_2": vocabulary.files(WORDS, "!"),
    }
    scheduler = {"num_train_timesteps": 1000, "shift": 3.0}
    pipeline.save_pipeline(root, tokenizers=tokenizers, scheduler=scheduler, **parts)
    return root


@pytest.fixture(scope="module")
def theirs(tiny, oracle):
    import diffusers

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipe, n):
    return np.random.default_rng(3).standard_normal((n, *pipe.latent_shape())).astype(np.float32)


@pytest.mark.torch
def test_our_folder_loads_in_diffusers_and_gives_the_same_images(tiny, theirs, oracle):
    pipe = pipeline.load_pipeline(tiny, t5_length=T5)
    full = pipe.encode(PROMPTS)
    tokens, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, max_sequence_length=T5)
    oracle.assert_close(full.tokens, tokens, 1e-5)
    oracle.assert_close(full.pooled, pooled, 1e-5)
    x = noise(pipe, 3)
    ours = pipe.sample(PROMPTS, latents=x, num_steps=8, guidance=4.5)
    images = theirs(
        PROMPTS,
        latents=oracle.torch(x).permute(0, 3, 1, 2),
        num_inference_steps=8,
        guidance_scale=4.5,
        max_sequence_length=T5,
        height=6,
        width=6,
        output_type="pt",
    ).images
    assert ours.shape == (3, 6, 6, 3)
    assert float(images.std()) > 0.05
    assert np.abs(ours - images.permute(0, 2, 3, 1).numpy()).max() < 1e-4  # 8 guided steps of float32


@pytest.mark.torch
@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 4.5])
def test_the_shipped_pipeline_loads_in_diffusers_and_gives_the_same_images(oracle, guidance):
    import diffusers

    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
        pipeline.pipeline_folder("shapes"), text_encoder_3=None, tokenizer_3=None
    )
    theirs.set_progress_bar_config(disable=True)
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
    assert (ours.transformer, ours.vae, ours.text_encoders) == (
        again.transformer,
        again.vae,
        again.text_encoders,
    )


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
    got = jax.jit(pipeline.guided(raw, 3.0))(params, x, t, cond)
    with_prompt = pipe.velocity(x, t, cond)
    without = pipe.velocity(x, t, negative.rows(jnp.zeros(2, int)))
    np.testing.assert_allclose(got, without + 3.0 * (with_prompt - without), atol=1e-5)
    assert pipeline.guided(raw, 1.0) is raw


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
    from smart_grpo_jax.hub import safetensors

    tensors = adapters.to_tensors(pipe.transformer, tree, spec.scale)
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
    dynamic = dataclasses.replace(pipe, scheduler={"use_dynamic_shifting": True, "max_shift": 1.15})
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
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
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


def test_t5_with_weights_is_refused_and_without_weights_is_absent(tiny, tmp_path):
    root = damaged(tiny, tmp_path, "model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"]})
    pipeline.load_pipeline(root)
    (root / "text_encoder_3").mkdir()
    shutil.copy(
        root / "vae" / "diffusion_pytorch_model.safetensors", root / "text_encoder_3" / "model.safetensors"
    )
    with pytest.raises(UserError, match="T5EncoderModel"):
        pipeline.load_pipeline(root)


@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large"])
def test_published_sizes_are_counted_without_weights(name):
    counts = {"sd35-medium": (2_243_171_520, 909), "sd35-large": (8_056_627_520, 1227)}
    config = preset(name)["transformer"]
    places = list(tables.places(tables.MMDIT, config))
    learned = [p for p in places if p.path != "pos_embed/pos_embed"]
    size = sum(int(np.prod(p.shape)) * len(p.keys) for p in learned)
    assert (size, sum(len(p.keys) for p in places)) == counts[name]
    vae, text, text_2 = (preset(name)[part] for part in ("vae", "text_encoder", "text_encoder_2"))
    for table, part, size, tensors in (
        (tables.VAE, vae, 83_819_683, 244),
        (tables.CLIP_TEXT, text, 123_650_304, 197),
        (tables.CLIP_TEXT, text_2, 694_659_840, 517),
    ):
        places = list(tables.places(table, part))
        assert sum(int(np.prod(p.shape)) * len(p.keys) for p in places) == size
        assert sum(len(p.keys) for p in places) == tensors
