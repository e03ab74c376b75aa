"""Adapters: what they add, where they sit, how they start."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import lora
from smart_grpo_jax.models.flux import Flux
from smart_grpo_jax.models.lora import FLUX_TARGETS, SD3_TARGETS, LoRA, LoRADense
from smart_grpo_jax.models.mmdit import MMDiT
from smart_grpo_jax.models.presets import preset

INPUTS = [(1, 2, 2, 4), (1,), (1, 3, 24), (1, 14)]
SHAPES = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in INPUTS]
CONFIG = preset("tiny")["transformer"]


class Two(nn.Module):
    spec: LoRA = LoRA()

    @nn.compact
    def __call__(self, x):
        return LoRADense(3, self.spec, name="there")(LoRADense(5, self.spec, use_bias=False, name="here")(x))


def fresh(key=0, rank=3, targets=SD3_TARGETS):
    spec = LoRA(rank, 2.0 * rank, targets)
    return lora.init_lora(jax.random.key(key), MMDiT(CONFIG, rank, 2.0 * rank, targets), spec, *SHAPES)


def test_an_adapter_adds_its_scaled_product():
    spec, rng = LoRA(2, 6.0, (r"/here$",)), np.random.default_rng(0)
    x = rng.standard_normal((4, 7), np.float32)
    variables = Two(spec).init(jax.random.key(0), x)
    assert set(variables["lora"]) == {"here"}
    a, b = (rng.standard_normal(s, np.float32) for s in ((7, 2), (2, 5)))
    params = variables["params"]
    got = Two(spec).apply({"params": params, "lora": {"here": {"a": a, "b": b}}}, x)
    hidden = x @ params["here"]["kernel"] + 3.0 * (x @ a) @ b
    want = hidden @ params["there"]["kernel"] + params["there"]["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    merged = lora.merge(params, {"here": {"a": a, "b": b}}, spec.scale)
    np.testing.assert_allclose(Two().apply({"params": merged}, x), want, rtol=1e-4, atol=1e-4)


def test_a_fresh_adapter_changes_nothing():
    spec = LoRA(2, 4.0, (r"here",))
    x = np.ones((1, 3), np.float32)
    params = Two().init(jax.random.key(0), x)["params"]
    tree = lora.init_lora(jax.random.key(1), Two(spec), spec, x)
    assert (Two(spec).apply({"params": params, "lora": tree}, x) == Two().apply({"params": params}, x)).all()


def test_rank_zero_has_and_reads_no_adapter():
    assert "lora" not in jax.eval_shape(MMDiT(CONFIG).init, jax.random.key(0), *SHAPES)


def test_published_targets_are_the_joint_attention_alone():
    tree = fresh()
    for stack, modules in {"dual": 8, "joint": 8, "last": 7}.items():  # the last layer has no to_add_out
        assert set(tree[stack]) == {"attn"}
        assert len(tree[stack]["attn"]) == modules
    assert tree["dual"]["attn"]["to_q"]["a"].shape == (1, 16, 3)


def test_sd35_medium_has_191_adapted_modules_with_18_8_million_parameters():
    config = preset("sd35-medium")["transformer"]
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 2, 2, 16), (1,), (1, 1, 4096), (1, 2048))]
    tree = jax.eval_shape(MMDiT(config, 32, 64.0).init, jax.random.key(0), *inputs)["lora"]
    leaves = jax.tree.leaves(tree)
    assert sum(leaf.shape[0] for leaf in leaves) == 2 * 191
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == 18_776_064


FLUX_DOUBLE = {
    *(f"attn/{name}" for name in ("to_q", "to_k", "to_v", "to_out_0", "to_add_out")),
    *(f"attn/add_{name}_proj" for name in "qkv"),
    *(f"{name}/{part}" for name in ("ff", "ff_context") for part in ("net_0/proj", "net_2")),
}


def test_flux_dev_has_342_adapted_modules():
    config = preset("flux-dev")["transformer"]
    shapes = [(1, 2, 2, 16), (1,), (1, 1, 4096), (1, 768), (1,)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    tree = jax.eval_shape(Flux(config, 32, 64.0).init, jax.random.key(0), *inputs)["lora"]
    found = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    single = {f"single/attn/to_{name}" for name in "qkv"}
    assert {path[:-2] for path in found} == {f"double/{name}" for name in FLUX_DOUBLE} | single
    assert sum(shape[0] for shape in found.values()) == 2 * (19 * 12 + 38 * 3)
    assert found["double/ff/net_2/a"] == (19, 4 * 3072, 32)
    assert set(SD3_TARGETS) < set(FLUX_TARGETS)


def test_factors_start_as_published_and_do_not_depend_on_other_targets():
    tree, alone = fresh(rank=8), fresh(rank=8, targets=(r"/attn/to_q$",))
    a = np.concatenate([np.ravel(m["a"]) for s in tree.values() for m in s["attn"].values()])
    assert abs(a.std() * 8 - 1) < 0.05  # 3,000 draws of std 1/r
    assert not any(m["b"].any() for s in tree.values() for m in s["attn"].values())
    np.testing.assert_array_equal(tree["joint"]["attn"]["to_q"]["a"], alone["joint"]["attn"]["to_q"]["a"])
    assert (tree["joint"]["attn"]["to_q"]["a"] != tree["joint"]["attn"]["to_k"]["a"]).all()
    assert (fresh(1, 8)["last"]["attn"]["to_q"]["a"] != tree["last"]["attn"]["to_q"]["a"]).all()


def test_a_target_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="to_qq"):
        fresh(targets=(r"/attn/to_q$", r"/attn/to_qq$"))


def test_a_missing_adapter_is_an_error():
    spec = LoRA(2, 4.0, (r"here",))
    x = np.ones((1, 3), np.float32)
    params = Two().init(jax.random.key(0), x)["params"]
    with pytest.raises(Exception, match="lora"):
        Two(spec).apply({"params": params}, x)
