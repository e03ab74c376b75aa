"""LoRA files of every spelling: the same tree, or one line that says why not."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as folders

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import adapters, export, pipeline, safetensors
from smart_grpo_jax.models import lora

RANK, ALPHA = 3, 12.0


@pytest.fixture(scope="module", params=["sd35-medium", "flux"])
def case(request, tmp_path_factory):
    """A pipeline and a random adapter of its network."""
    pipe = pipeline.load_pipeline(
        folders.write(tmp_path_factory.mktemp("p"), request.param), t5_length=9, text=False
    )
    module, spec, *inputs = pipe.adapter(RANK, ALPHA)
    tree = lora.init_lora(jax.random.key(0), module, spec, *inputs)
    rng = np.random.default_rng(1)
    tree = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32) / 4, tree)
    return pipe, tree, ALPHA / RANK


def written(case, scale):
    pipe, tree, _ = case
    return adapters.to_tensors(pipe.weights_table, pipe.transformer, tree, scale)


def read(case, path):
    pipe, _, _ = case
    return adapters.read(path, pipe.weights_table, pipe.transformer)


def folded(case):
    """The tree whose scale is in b, as every reading should give it."""
    _, tree, scale = case
    return jax.tree_util.tree_map_with_path(lambda p, a: scale * a if p[-1].key == "b" else a, tree)


def assert_same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def renamed(tensors, change):
    return {change(key): value for key, value in tensors.items()}


SPELLINGS = {
    "ours": lambda key: key,
    "without prefix": lambda key: key.removeprefix("transformer."),
    "peft in memory": lambda key: key.replace("lora_A.", "lora_A.default.").replace(
        "lora_B.", "lora_B.default."
    ),
    "peft with a name": lambda key: re.sub(r"lora_([AB])", r"lora_\1.my_own", key),
    "older diffusers": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "attention processors": lambda key: re.sub(
        r"\.attn\.(to_out|\w+)(\.0)?\.lora_([AB])",
        lambda m: f".attn.processor.{m[1]}_lora.{'down' if m[3] == 'A' else 'up'}",
        key,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_the_keys_is_read(case, tmp_path, name):
    safetensors.write(tmp_path / adapters.FILE, renamed(written(case, case[2]), SPELLINGS[name]))
    assert_same(read(case, tmp_path), folded(case))
    assert_same(read(case, tmp_path / adapters.FILE), folded(case))


def test_alpha_tensors_the_header_and_pefts_config_give_the_scale(case, tmp_path):
    plain = written(case, 1.0)
    alphas = {
        key.replace("lora_A.weight", "alpha"): np.float32(ALPHA) * np.ones((), np.float32)
        for key in plain
        if "lora_A" in key
    }
    safetensors.write(tmp_path / "a.safetensors", plain | alphas)
    settings = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA}
    safetensors.write(tmp_path / "b.safetensors", plain, {adapters.METADATA: json.dumps(settings)})
    for name in "ab":
        assert_same(read(case, tmp_path / f"{name}.safetensors"), folded(case))
    pipe, tree, _ = case
    export.write_peft(tmp_path / "lora", pipe.weights_table, pipe.transformer, tree, RANK, ALPHA, "base")
    assert_same(read(case, tmp_path / "lora"), folded(case))
    assert_same(read(case, tmp_path), folded(case))  # flow_grpo: <checkpoint>/lora/
    config = json.loads((tmp_path / "lora" / adapters.PEFT_CONFIG).read_text())
    config["use_rslora"], config["lora_alpha"] = True, ALPHA / RANK**0.5
    (tmp_path / "lora" / adapters.PEFT_CONFIG).write_text(json.dumps(config))
    assert_same(read(case, tmp_path), folded(case))
    config |= {"use_rslora": False, "lora_alpha": 1.0, "alpha_pattern": {r"attn\.to_\w+(\.0)?": ALPHA}}
    config["alpha_pattern"][r".*(add_\w|to_add_out|net\.).*"] = ALPHA
    (tmp_path / "lora" / adapters.PEFT_CONFIG).write_text(json.dumps(config))
    assert_same(read(case, tmp_path), folded(case))


def peft(tmp_path, case, **change):
    pipe, tree, _ = case
    export.write_peft(tmp_path, pipe.weights_table, pipe.transformer, tree, RANK, ALPHA, "base")
    config = json.loads((tmp_path / adapters.PEFT_CONFIG).read_text())
    (tmp_path / adapters.PEFT_CONFIG).write_text(json.dumps(config | change))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"alpha_pattern": 3}, "lora_alpha"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_an_adapter_that_is_not_plain_is_refused_by_name(case, tmp_path, change, match):
    with pytest.raises(UserError, match=match):
        read(case, peft(tmp_path, case, **change))


DAMAGES = {
    "a text encoder's": (
        lambda t: t | {"text_encoder.x.lora_A.weight": np.zeros((1, 1), np.float32)},
        "text enc",
    ),
    "an unknown module's": (
        lambda t: renamed(t, lambda k: k.replace("transformer_blocks.0.attn", "transformer_blocks.9.attn")),
        r"no module.*transformer_blocks\.9",
    ),
    "half a pair": (lambda t: {k: v for k, v in t.items() if k != min(t)}, "lacks factor a"),
    "a factor too wide": (lambda t: t | {min(t): t[min(t)][:, 1:]}, "has an adapter"),
    "full weights": (lambda t: {"transformer.proj_out.weight": np.zeros((2, 2), np.float32)}, "no factor"),
    "a factor of one number": (lambda t: t | {min(t): np.zeros((), np.float32)}, "has an adapter"),
    "a factor of no rank": (lambda t: t | {min(t): t[min(t)][:0]}, "has an adapter"),
    "a number that is none": (lambda t: t | {min(t): t[min(t)] * np.nan}, "not finite"),
    "an alpha of two numbers": (
        lambda t: t | {min(t).replace("lora_A.weight", "alpha"): np.ones(2, np.float32)},
        "one number",
    ),
    "another tool's": (
        lambda t: {"lora_unet_double_blocks_0.lora_up.weight": np.zeros((2, 2), np.float32)},
        "no module",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_does_not_fit_is_one_line_and_never_silence(case, tmp_path, name):
    damage, match = DAMAGES[name]
    safetensors.write(tmp_path / adapters.FILE, damage(written(case, 1.0)))
    with pytest.raises(UserError, match=match) as caught:
        read(case, tmp_path)
    assert len(caught.value.line) <= 200


def test_pickles_stay_closed_and_a_folder_without_adapters_says_so(case, tmp_path):
    with pytest.raises(UserError, match="wanted a LoRA file"):
        read(case, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(UserError, match="pickle"):
            read(case, path)


@pytest.mark.parametrize("rank", [RANK, RANK + 2])
def test_a_start_from_a_file_is_its_velocity_and_can_learn(case, tmp_path, rank):
    pipe, _, _ = case
    safetensors.write(tmp_path / adapters.FILE, written(case, case[2]))
    module, spec, *inputs = pipe.adapter(rank, 5.0)
    fresh = lora.init_lora(jax.random.key(2), module, spec, *inputs)
    begun = adapters.start(tmp_path, read(case, tmp_path), fresh, spec.scale)
    for (path, found), (_, wanted) in zip(
        jax.tree_util.tree_leaves_with_path(lora.merge(pipe.params["transformer"], begun, spec.scale)),
        jax.tree_util.tree_leaves_with_path(lora.merge(pipe.params["transformer"], case[1], case[2])),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=str(path))
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, fresh)
    added = [a[..., RANK:] for p, a in jax.tree_util.tree_leaves_with_path(begun) if p[-1].key == "a"]
    assert all(np.any(a != 0, axis=-2).all() for a in added)  # a zero a with a zero b would never move


def test_layers_that_a_file_leaves_out_begin_fresh(case, tmp_path):
    pipe, _, _ = case
    block = ".transformer_blocks.1."
    kept = {k: v for k, v in written(case, case[2]).items() if block not in k}
    safetensors.write(tmp_path / adapters.FILE, kept)
    module, spec, *inputs = pipe.adapter(RANK, ALPHA)
    fresh = lora.init_lora(jax.random.key(2), module, spec, *inputs)
    begun = adapters.start(tmp_path, read(case, tmp_path), fresh, spec.scale)
    assert len(kept) < len(written(case, 1.0))
    assert all(
        np.any(a != 0, axis=-2).all()
        for p, a in jax.tree_util.tree_leaves_with_path(begun)
        if p[-1].key == "a"
    )


def test_a_start_that_does_not_fit_the_config_is_refused(case, tmp_path):
    pipe, _, _ = case
    safetensors.write(tmp_path / adapters.FILE, written(case, case[2]))
    for options, match in (
        ((RANK - 1, 1.0), r"adapter\.rank: got 2, wanted at least 3"),
        ((RANK, 1.0, (r"/attn/to_q$",)), r"adapter\.targets"),
    ):
        module, spec, *inputs = pipe.adapter(*options)
        fresh = lora.init_lora(jax.random.key(2), module, spec, *inputs)
        with pytest.raises(UserError, match=match):
            adapters.start(tmp_path, read(case, tmp_path), fresh, spec.scale)
