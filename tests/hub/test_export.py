"""What is written loads in PyTorch's diffusers and peft, and gives the trainer's velocity."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as folders

from smart_grpo_jax.core.errors import NumericsError, StorageError
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
    assert np.abs(found - wanted).max() < 1e-5 * size  # float32 of two libraries; 2.6e-6 was measured
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


def random_peft(root, pipe):
    """A torch transformer with an adapter made by peft: two ranks, two alphas, rank-stabilised."""
    import torch
    from peft import LoraConfig

    net = transformer(root / "transformer", pipe)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["attn.to_q", "attn.to_k", "attn.to_out.0", "ff.net.2"],
        rank_pattern={"to_q": 4},
        alpha_pattern={r"transformer_blocks\.1\.attn\.to_k": 7, "net.2": 5},
        use_rslora=True,
    )
    net.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) / 5)
    return net, config


@pytest.mark.torch
@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_an_adapter_that_others_made_has_their_velocity_here(trained, tmp_path, form):
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    root, pipe, tree = trained
    net, config = random_peft(root, pipe)
    state = get_peft_model_state_dict(net)
    if form == "diffusers":
        kind = getattr(diffusers, pipe.family.name)
        kind.save_lora_weights(
            tmp_path, transformer_lora_layers=state, **_collate_lora_metadata({"transformer": net})
        )
    else:
        config.save_pretrained(tmp_path)
        named = {f"{adapters.PEFT_PREFIX}{key}": value.contiguous() for key, value in state.items()}
        save_file(named, tmp_path / adapters.PEFT_FILE)
    place = (pipe.weights_table, pipe.transformer)
    params = adapters.fold(tmp_path, *place, pipe.params["transformer"])
    guidance = jnp.float32(3.5) if pipe.transformer.embeds_guidance else None
    found = jax.jit(pipe.velocity_fn())({"params": params, "lora": {}}, *inputs(pipe), guidance)
    assert_the_trainers(np.asarray(found), theirs(net, pipe), ours(pipe, tree)[1])


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


def test_adapters_are_merged_in_full_float32_on_every_device(trained, tmp_path):
    _, pipe, tree = trained
    place = (pipe.weights_table, pipe.transformer)
    export.write_lora(tmp_path, *place, tree, RANK, ALPHA / RANK)

    def products(base):
        whole = adapters.fold(tmp_path, *place, base)
        leaf = export.merged(base, tree, ALPHA / RANK, jnp.float32)
        return whole, [leaf(p.path) for p in adapters.kernels(*place).values()]

    text = str(jax.make_jaxpr(products)(pipe.params["transformer"]))
    assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST") > 4


def test_a_bfloat16_export_holds_bfloat16(trained, tmp_path):
    root, pipe, tree = trained
    leaf = export.merged(pipe.params["transformer"], tree, ALPHA / RANK, jnp.bfloat16)
    published = read_json(root / "transformer", "config.json")
    place = (pipe.weights_table, pipe.transformer)
    export.write_transformer(tmp_path / "transformer", *place, published, leaf, jnp.bfloat16)
    reader = safetensors.open_folder(tmp_path / "transformer", export.BASE)
    assert {reader.dtype(key) for key in reader.keys()} == {np.dtype(jnp.bfloat16)}


@pytest.fixture
def written(trained, tmp_path):
    """A LoRA file, and what it should hold."""
    _, pipe, tree = trained
    place = (pipe.weights_table, pipe.transformer)
    export.write_lora(tmp_path, *place, tree, RANK, ALPHA / RANK)
    return tmp_path / adapters.FILE, adapters.to_tensors(*place, tree, ALPHA / RANK)


def test_a_file_as_it_was_meant_passes(written):
    file, meant = written
    assert read_back(file, meant) == len(meant) > 0


def read_back(file, meant):
    """Both looks at a file."""
    reader = safetensors.Tensors(file)
    count = export.same_keys("lora", reader, meant)
    export.same_tensors("lora", reader, meant.items())
    return count


TAMPERINGS = {
    "a flipped bit": (lambda t: t | {max(t): flipped(t[max(t)])}, "other bits"),
    "a dropped key": (lambda t: {k: v for k, v in t.items() if k != max(t)}, "without"),
    "a key too many": (lambda t: t | {"x": np.zeros(1, np.float32)}, "unknown"),
    "another type": (lambda t: t | {max(t): t[max(t)].astype(np.float16)}, "other bits"),
    "another shape": (lambda t: t | {max(t): t[max(t)].T}, "other bits"),
    "a zero of the other sign": (lambda t: t | {max(t): -np.zeros_like(t[max(t)])}, "other bits"),
}


def flipped(array):
    """The same numbers but for the last bit of one: far below what a velocity shows."""
    raw = array.copy()
    raw.reshape(-1).view(np.uint32)[-1] ^= 1
    return raw


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_file_is_caught(written, name):
    file, meant = written
    if "zero" in name:
        meant |= {max(meant): np.zeros_like(meant[max(meant)])}
    change, says = TAMPERINGS[name]
    safetensors.write(file, change(meant))
    with pytest.raises(StorageError, match=says):
        read_back(file, meant)


def test_a_file_that_cannot_be_read_back_is_a_failed_export_and_no_mistake_of_the_users(written):
    file, _ = written
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"export lora: .*not a whole safetensors file"):
        with export.reading_back("lora"):
            safetensors.Tensors(file)
    with pytest.raises(NumericsError), export.reading_back("lora"):
        raise NumericsError("keeps its own exit code")


def test_trees_are_compared_by_name_and_bit():
    tree = {"a": {"b": np.array([0.0, np.nan], np.float32)}, "c": np.ones(2, np.float32)}
    export.same_trees("orbax", jax.tree.map(np.copy, tree), tree)
    for found in (
        {**tree, "c": flipped(tree["c"])},
        {"a": tree["a"]},
        {**tree, "d": tree["c"]},
        {**tree, "a": {"b": -tree["a"]["b"]}},
    ):
        with pytest.raises(StorageError, match="export orbax"):
            export.same_trees("orbax", found, tree)


def test_a_read_back_that_differs_or_is_the_base_is_no_export():
    base, wanted = jnp.zeros((2, 3)), jnp.ones((2, 3))
    good = export.compare("lora", wanted + 1e-7, wanted, base, 4, 1e-5)
    assert good.tensors == 4 and good.difference < 1e-6 and good.from_base > 0.9 and good.learned == 1
    with pytest.raises(StorageError, match="differs by"):
        export.compare("lora", wanted * 2, wanted, base, 4, 1e-5)
    with pytest.raises(StorageError, match="differs by"):
        export.compare("lora", wanted * jnp.nan, wanted, base, 4, 1e-5)
    with pytest.raises(StorageError, match="differs by"):
        export.compare("lora", base, wanted, base, 4, 1e-5)
    untrained = export.compare("lora", wanted, wanted, wanted, 4, 1e-5)
    assert untrained.from_base == untrained.learned == 0
    with pytest.raises(NumericsError, match="not finite"):
        export.compare("lora", wanted, wanted * jnp.nan, base, 4, 1e-5)


SETTINGS = {
    "title": "T",
    "method": "Smart-GRPO",
    "base": "owner/base",
    "pipeline": "FluxPipeline",
    "transformer": "FluxTransformer2DModel",
    "absent": ["text_encoder_3"],
    "call": {"prompt": 'a "red" | circle\n{x}', "num_inference_steps": 4, "guidance_scale": 3.5},
}
CHECKS = [export.Check(name, 3, 1e-7, 0.2, 0.2) for name in card.SNIPPETS]
FACTS = {"weights": "averaged weights", "epoch": 3, "prompts": "a|b"}


def test_a_card_tells_everything_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("x")
    files = card.digests(tmp_path)
    assert files == {"a/b.txt": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    scores = {"reward": {"base": 0.25, "trained": 0.5}, "strict": {"trained": 1.0}}
    text = card.card(FACTS, SETTINGS, CHECKS, files, scores, ["mind the rounding"])
    assert text.startswith('---\nbase_model: "owner/base"\nbase_model_relation: adapter\n')
    for words in (
        "load_lora_weights",
        "PeftModel",
        "StandardCheckpointer",
        "text_encoder_3=None",
        "| prompts | a\\|b |",
        "3 of 3 tensors equal",
        "| reward | 0.25 | 0.5 |",
        "| strict |  | 1 |",
        "Note: mind the rounding.",
        files["a/b.txt"],
    ):
        assert text.count(words) >= 1, words
    whole = card.card(FACTS, SETTINGS, [c for c in CHECKS if c.name == "full"], files)
    assert "base_model_relation: finetune" in whole and "lora" not in whole.split("---")[1]


@pytest.mark.parametrize("base", ["owner/base", "shapes", 'C:\\folder "x"'])
def test_the_snippets_of_a_card_are_python_that_names_the_base_and_the_prompt(base):
    text = card.card(FACTS, {**SETTINGS, "base": base}, CHECKS, {})
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "snippet", "exec")
    call = re.search(r"image = pipe\((.*)\)\.images", blocks[0], re.DOTALL)
    assert eval(f"dict({call[1]})") == SETTINGS["call"]
    names = {}
    exec(card.base_line(base), names)
    assert (names["base"] / "model_index.json").is_file() if base == "shapes" else names["base"] == base
