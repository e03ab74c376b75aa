"""What is written loads in PyTorch's diffusers and peft, and gives the trainer's velocity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as folders

from smart_grpo_jax.core.errors import StorageError
from smart_grpo_jax.hub import adapters, card, export, folder, pipeline, safetensors
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.models import lora

RANK, ALPHA = 3, 12.0
SIZE = 8


@pytest.fixture(scope="module", params=["sd35-medium", "sd35-large", "flux"])
def trained(request, tmp_path_factory):
    """A pipeline's folder, the pipeline, and adapters that have moved."""
    root = folders.write(tmp_path_factory.mktemp("p"), request.param)
    pipe = pipeline.load_pipeline(root, t5_length=9)
    module, spec, *inputs = pipe.adapter(RANK, ALPHA)
    tree = lora.init_lora(jax.random.key(0), module, spec, *inputs)
    rng = np.random.default_rng(1)
    tree = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32) / 8, tree)
    return root, pipe, tree


def inputs(pipe):
    x = np.random.default_rng(3).standard_normal((2, *pipe.latent_shape(SIZE))).astype(np.float32)
    return x, np.array([0.9, 0.4], np.float32), pipe.encode(folders.PROMPTS[:2])


def ours(pipe, tree, rank=RANK, alpha=ALPHA):
    """The trainer's velocity, and the base's."""
    guidance = jnp.float32(3.5) if pipe.transformer.embeds_guidance else None
    params = {"params": pipe.params["transformer"], "lora": tree}
    run = lambda *options: jax.jit(pipe.velocity_fn(*options))(params, *inputs(pipe), guidance)
    return np.asarray(run(rank, alpha)), np.asarray(run())


def theirs(net, pipe):
    """The same inputs through a torch transformer."""
    import torch

    x, t, cond = inputs(pipe)
    tensor = lambda a: torch.from_numpy(np.array(a))
    tokens, pooled = tensor(cond.tokens), tensor(cond.pooled)
    with torch.no_grad():
        if pipe.family.name != "FluxPipeline":
            x = tensor(x).permute(0, 3, 1, 2)
            v = net(x, tokens, pooled, 1000 * tensor(t), return_dict=False)[0]
            return v.permute(0, 2, 3, 1).numpy()
        b, h, w, c = x.shape
        packed = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, 4 * c)
        ids = torch.zeros(h // 2, w // 2, 3)
        ids[..., 1], ids[..., 2] = torch.arange(h // 2)[:, None], torch.arange(w // 2)
        v = net(
            hidden_states=tensor(packed),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=tensor(t),
            guidance=torch.full((b,), 3.5),
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(tokens.shape[1], 3),
            return_dict=False,
        )[0].numpy()
        return v.reshape(b, h // 2, w // 2, c, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(x.shape)


def assert_the_trainers(found, wanted, base):
    size = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 2e-4 * size  # float32 of two libraries
    assert np.abs(found - base).max() > 1e-2 * size


def transformer(root, pipe):
    import diffusers

    kind = getattr(diffusers, pipe.weights_table.name)
    return kind.from_pretrained(root).eval()


@pytest.mark.torch
def test_a_lora_file_loads_with_load_lora_weights(trained, tmp_path):
    import diffusers

    root, pipe, tree = trained
    export.write_lora(tmp_path, pipe.weights_table, pipe.transformer, tree, RANK, ALPHA / RANK)
    absent = {}
    if pipe.family.name == "StableDiffusion3Pipeline" and pipe.text.t5 is None:
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    torch_pipe = getattr(diffusers, pipe.family.name).from_pretrained(root, **absent)
    torch_pipe.load_lora_weights(tmp_path)
    assert_the_trainers(theirs(torch_pipe.transformer, pipe), *ours(pipe, tree))


@pytest.mark.torch
def test_a_lora_file_says_the_same_without_its_header(trained, tmp_path):
    _, pipe, tree = trained
    place = (pipe.weights_table, pipe.transformer)
    export.write_lora(tmp_path, *place, tree, RANK, ALPHA / RANK)
    reader = safetensors.Tensors(tmp_path / adapters.FILE)
    settings = json.loads(reader.metadata()[adapters.METADATA])
    assert settings["transformer.lora_alpha"] == settings["transformer.r"] == RANK
    assert len(settings["transformer.target_modules"]) == len(reader.keys()) // 2
    with_header = adapters.read(tmp_path, *place)
    safetensors.write(tmp_path / adapters.FILE, {key: reader.tensor(key) for key in reader.keys()})
    jax.tree.map(np.testing.assert_array_equal, with_header, adapters.read(tmp_path, *place))


@pytest.mark.torch
def test_a_peft_folder_loads_in_peft_and_comes_back_with_the_same_numbers(trained, tmp_path):
    from peft import PeftModel

    root, pipe, tree = trained
    place = (pipe.weights_table, pipe.transformer)
    export.write_peft(tmp_path / "ours", *place, tree, RANK, ALPHA, "base")
    net = PeftModel.from_pretrained(transformer(root / "transformer", pipe), tmp_path / "ours")
    wanted, base = ours(pipe, tree)
    assert_the_trainers(theirs(net, pipe), wanted, base)
    net.save_pretrained(tmp_path / "theirs")
    again = adapters.read(tmp_path / "theirs", *place)
    found, _ = ours(pipe, again, RANK, float(RANK))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.torch
@pytest.mark.parametrize("shard", [export.SHARD, 40_000])
def test_a_whole_transformer_loads_with_from_pretrained(trained, tmp_path, shard):
    root, pipe, tree = trained
    place = (pipe.weights_table, pipe.transformer)
    leaf = export.merged(pipe.params["transformer"], tree, ALPHA / RANK, jnp.float32)
    published = read_json(root / "transformer", "config.json")
    export.write_transformer(tmp_path / "transformer", *place, published, leaf, jnp.float32, shard)
    shards = list((tmp_path / "transformer").glob("*.safetensors"))
    assert (len(shards) == 1) == (shard == export.SHARD)
    assert all(path.stat().st_size < 60_000 for path in shards) or len(shards) == 1
    wanted, base = ours(pipe, tree)
    assert_the_trainers(theirs(transformer(tmp_path / "transformer", pipe), pipe), wanted, base)
    config = folder.read_config(tmp_path, "transformer", pipe.weights_table.name)
    assert config == pipe.transformer
    again = folder.read_params(tmp_path, "transformer", pipe.weights_table.name, config, None)
    merged = lora.merge(pipe.params["transformer"], tree, ALPHA / RANK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)


def test_a_bfloat16_export_holds_bfloat16(trained, tmp_path):
    root, pipe, tree = trained
    leaf = export.merged(pipe.params["transformer"], tree, ALPHA / RANK, jnp.bfloat16)
    published = read_json(root / "transformer", "config.json")
    place = (pipe.weights_table, pipe.transformer)
    export.write_transformer(tmp_path / "transformer", *place, published, leaf, jnp.bfloat16)
    reader = safetensors.open_folder(tmp_path / "transformer", export.BASE)
    assert {reader.dtype(key) for key in reader.keys()} == {np.dtype(jnp.bfloat16)}


def test_a_read_back_that_differs_or_is_the_base_is_no_export():
    base, wanted = jnp.zeros((2, 3)), jnp.ones((2, 3))
    good = export.compare("lora", wanted + 1e-7, wanted, base, 4, 1e-5)
    assert good.tensors == 4 and good.difference < 1e-6 and good.from_base > 0.9
    with pytest.raises(StorageError, match="differs by"):
        export.compare("lora", wanted * 2, wanted, base, 4, 1e-5)
    with pytest.raises(StorageError, match="differs by"):
        export.compare("lora", wanted * jnp.nan, wanted, base, 4, 1e-5)
    with pytest.raises(StorageError, match="differs by"):
        export.compare("lora", base, wanted, base, 4, 1e-5)
    untrained = export.compare("lora", wanted, wanted, wanted, 4, 1e-5)
    assert untrained.from_base == 0


def test_a_card_loads_what_it_lies_beside(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("x")
    files = card.digests(tmp_path)
    settings = {
        "title": "T",
        "method": "Smart-GRPO",
        "base": "owner/base",
        "pipeline": "FluxPipeline",
        "transformer": "FluxTransformer2DModel",
        "prompt": "a | b",
        "steps": 4,
        "guidance": 3.5,
    }
    checks = [export.Check(name, 3, 1e-7, 0.2) for name in card.SNIPPETS]
    facts = {"weights": "averaged weights", "epoch": 3, "prompts": "a|b"}
    text = card.card(facts, settings, checks, files)
    assert text.startswith('---\nbase_model: "owner/base"\n')
    for words in (
        "load_lora_weights",
        "PeftModel",
        "from_pretrained",
        "StandardCheckpointer",
        "a\\|b",
        "3 of 3",
    ):
        assert words in text
    assert files == {"a/b.txt": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "snippet", "exec")
