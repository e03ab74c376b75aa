"""The SD3 transformer against diffusers, and what must hold without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import tables
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig, position_table

# n_dual 0, 1, 2 and all; qk norm on and off; one layer; odd sizes; patch 1 and 2.
CONFIGS = {
    "one_dual_patch_1": dict(
        sample_size=3, patch_size=1, in_channels=5, num_layers=4, attention_head_dim=12, num_attention_heads=3,
        joint_attention_dim=20, caption_projection_dim=36, pooled_projection_dim=14, out_channels=5,
        pos_embed_max_size=7, dual_attention_layers=[0], qk_norm="rms_norm",
    ),
    "two_dual_no_joint": dict(
        sample_size=10, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=9, caption_projection_dim=16, pooled_projection_dim=5, out_channels=4,
        pos_embed_max_size=6, dual_attention_layers=[0, 1], qk_norm="rms_norm",
    ),
    "sd30_without_dual_or_norm": dict(
        sample_size=8, patch_size=2, in_channels=3, num_layers=3, attention_head_dim=20, num_attention_heads=3,
        joint_attention_dim=11, caption_projection_dim=60, pooled_projection_dim=6, out_channels=None,
        pos_embed_max_size=5,
    ),
    "single_dual_layer": dict(
        sample_size=4, patch_size=1, in_channels=2, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=7, out_channels=2,
        pos_embed_max_size=6, dual_attention_layers=[0],
    ),
}  # fmt: skip
TINY = CONFIGS["one_dual_patch_1"]


def inputs(config, rows, columns, length=6, batch=2):
    keys = jax.random.split(jax.random.key(1), 4)
    return (
        jax.random.normal(keys[0], (batch, rows, columns, config.in_channels)),
        jnp.linspace(0.13, 0.97, batch),
        jax.random.normal(keys[2], (batch, length, config.joint_attention_dim)),
        jax.random.normal(keys[3], (batch, config.pooled_projection_dim)),
    )


def random_params(config):
    """Every leaf random, so that no branch is hidden behind a small gate."""
    shapes = tables.mmdit_shapes(config)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(
        [0.2 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    )


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_equals_diffusers(name, oracle):
    from diffusers import SD3Transformer2DModel

    config = MMDiTConfig.from_json(CONFIGS[name])
    net = oracle.random(SD3Transformer2DModel(**CONFIGS[name]))
    params = tables.to_params(tables.MMDIT, config, oracle.reader(net))
    p = config.patch_size
    x, t, tokens, pooled = inputs(config, 2 * p, 3 * p)
    ours = jax.jit(MMDiT(config).apply)({"params": params}, x, t, tokens, pooled)
    theirs = net(
        oracle.torch(x).permute(0, 3, 1, 2), oracle.torch(tokens), oracle.torch(pooled), 1000 * oracle.torch(t)
    )[0].permute(0, 2, 3, 1)
    oracle.assert_close(ours, theirs, 1e-5)  # float32 against float64 is 5e-7 of max


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_position_table_of_a_fresh_network_equals_diffusers(name):
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(**CONFIGS[name])
    config = MMDiTConfig.from_json(CONFIGS[name])
    np.testing.assert_allclose(position_table(config), net.pos_embed.pos_embed.numpy(), atol=1e-6)


def test_repeats_equal_the_expanded_sequence():
    config = MMDiTConfig.from_json(TINY)
    params = random_params(config)
    x, t, tokens, pooled = inputs(config, 3, 2)
    expanded = jnp.concatenate([tokens[:, :-1], jnp.repeat(tokens[:, -1:], 50, 1)], 1)
    net = MMDiT(config)
    compact = net.apply({"params": params}, x, t, tokens, pooled, repeats=50)
    full = net.apply({"params": params}, x, t, expanded, pooled)
    assert jnp.abs(compact - full).max() <= 1e-5 * jnp.abs(full).max()  # rounding of two summation orders
    once = net.apply({"params": params}, x, t, tokens, pooled)
    assert jnp.abs(once - full).max() > 1e-3 * jnp.abs(full).max()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_keeps_the_gradient(remat):
    config = MMDiTConfig.from_json(TINY)
    params, batch = random_params(config), inputs(config, 2, 2)

    def gradient(mode):
        net = MMDiT(config, remat=mode)
        return jax.grad(lambda p: jnp.square(net.apply({"params": p}, *batch)).mean())(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient("none"), gradient(remat))


def test_position_table_gets_no_gradient():
    config = MMDiTConfig.from_json(TINY)
    params, batch = random_params(config), inputs(config, 2, 2)
    grad = jax.grad(lambda p: jnp.square(MMDiT(config).apply({"params": p}, *batch)).mean())(params)
    assert not grad["pos_embed"]["pos_embed"].any()
    assert grad["pos_embed"]["proj"]["kernel"].any()


def test_vmap_over_candidates_equals_the_folded_batch():
    config = MMDiTConfig.from_json(TINY)
    params, (x, t, tokens, pooled) = random_params(config), inputs(config, 2, 2)
    xs = jnp.stack([x, 2 * x, -x])
    apply = MMDiT(config).apply
    mapped = jax.vmap(lambda one: apply({"params": params}, one, t, tokens, pooled))(xs)
    looped = jnp.stack([apply({"params": params}, one, t, tokens, pooled) for one in xs])
    np.testing.assert_allclose(mapped, looped, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32():
    config = MMDiTConfig.from_json(TINY)
    params, batch = random_params(config), inputs(config, 2, 2)
    full = MMDiT(config).apply({"params": params}, *batch)
    half = MMDiT(config, dtype=jnp.bfloat16).apply({"params": params}, *batch)
    assert half.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(half - full) / jnp.linalg.norm(full) < 0.03  # torch: 0.7-1.0 % RMS


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dual_attention_layers": [1]}, "dual_attention_layers"),
        ({"dual_attention_layers": [0, 1, 2, 3, 4]}, "num_layers"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"caption_projection_dim": 40}, "caption_projection_dim"),
        ({"guidance_embeds": True}, "guidance_embeds"),
    ],
)
def test_a_feature_that_is_not_built_is_refused(change, match):
    with pytest.raises(UserError, match=match):
        MMDiTConfig.from_json(TINY | change)


def test_latents_that_do_not_fit_the_patches_are_refused():
    config = MMDiTConfig.from_json(CONFIGS["two_dual_no_joint"])
    with pytest.raises(UserError, match="5×4"):
        MMDiT(config).apply({"params": random_params(config)}, *inputs(config, 5, 4))
