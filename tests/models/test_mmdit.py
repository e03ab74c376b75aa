"""The SD3 transformer against diffusers, and what must hold without it."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import tables, weights
from smart_grpo_jax.models import layers, mmdit
from smart_grpo_jax.models.embeddings import position_table
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig

# n_dual 0, 1, 2 and all; qk norm on and off; one layer; odd sizes; patch 1 and 2.
CONFIGS = {
    "one_dual_patch_1": dict(
        sample_size=3, patch_size=1, in_channels=5, num_layers=4, attention_head_dim=12,
        num_attention_heads=3, joint_attention_dim=20, caption_projection_dim=36, pooled_projection_dim=14,
        out_channels=5, pos_embed_max_size=7, dual_attention_layers=[0], qk_norm="rms_norm",
    ),
    "two_dual_no_joint": dict(
        sample_size=10, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=9, caption_projection_dim=16, pooled_projection_dim=5,
        out_channels=4, pos_embed_max_size=6, dual_attention_layers=[0, 1], qk_norm="rms_norm",
    ),
    "sd30_without_dual_or_norm": dict(
        sample_size=8, patch_size=2, in_channels=3, num_layers=3, attention_head_dim=20,
        num_attention_heads=3, joint_attention_dim=11, caption_projection_dim=60, pooled_projection_dim=6,
        out_channels=None, pos_embed_max_size=5,
    ),
    "all_dual": dict(
        sample_size=6, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=5,
        joint_attention_dim=7, caption_projection_dim=40, pooled_projection_dim=9,
        out_channels=4, pos_embed_max_size=4, dual_attention_layers=[0, 1], qk_norm="rms_norm",
    ),
    "single_dual_layer": dict(
        sample_size=4, patch_size=1, in_channels=2, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=7,
        out_channels=2, pos_embed_max_size=6, dual_attention_layers=[0],
    ),
}  # fmt: skip
TINY = CONFIGS["one_dual_patch_1"]


def inputs(config, rows, columns, length=6, batch=2):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, rows, columns, config.in_channels), np.float32)
    tokens = rng.standard_normal((batch, length, config.joint_attention_dim), np.float32)
    pooled = rng.standard_normal((batch, config.pooled_projection_dim), np.float32)
    return x, np.linspace(0.13, 0.97, batch, dtype=np.float32), tokens, pooled


def random_params(config):
    """Every leaf random, so that no branch is hidden behind a small gate."""
    rng = np.random.default_rng(0)
    shapes = weights.mmdit_shapes(config)
    return jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape, np.float32), shapes)


def velocity(net, **static):
    """The network as one compiled function of (params, x, t, tokens, pooled)."""
    return jax.jit(lambda params, *batch: net.apply({"params": params}, *batch, **static))


def both(name, oracle):
    """A random network as (config, params, batch, the velocity of diffusers)."""
    from diffusers import SD3Transformer2DModel

    config = MMDiTConfig.from_json(CONFIGS[name])
    net = oracle.random(SD3Transformer2DModel(**CONFIGS[name]))
    table = net.pos_embed.pos_embed  # a buffer; changed so that only reading it gives the right numbers
    table.add_(0.2 * oracle.torch(np.random.default_rng(2).standard_normal(table.shape, np.float32)))
    params = tables.to_params(weights.MMDIT, config, oracle.reader(net))
    p = config.patch_size
    batch = x, t, tokens, pooled = inputs(config, 2 * p, 3 * p)
    x, tokens, pooled, t = (oracle.torch(a) for a in (x, tokens, pooled, t))
    theirs = net(x.permute(0, 3, 1, 2), tokens, pooled, 1000 * t)[0].permute(0, 2, 3, 1)
    return config, params, batch, theirs


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_equals_diffusers(name, oracle):
    config, params, batch, theirs = both(name, oracle)
    oracle.assert_close(velocity(MMDiT(config))(params, *batch), theirs, 1e-5)  # float32: 5e-7 of max


def dual_after_the_residual():
    """The second attention reads the image after the joint one, not the same normed image."""
    seen = {}

    def interceptor(call, args, kwargs, context):
        name = context.module.name
        if isinstance(context.module, mmdit.Block) and isinstance(args[0], tuple):
            seen["image"] = args[0][0]
        if name == "attn2":
            m, x = seen["norm1"], seen["image"] + seen["norm1"][2][:, None] * seen["attn"][0]
            args = (layers.modulated(layers.layer_norm(x), m[6], m[7]),)
        out = call(*args, **kwargs)
        seen[name] = out
        return out

    return nn.intercept_methods(interceptor)


CONTROLS = ["exact GELU", "norm_out swapped", "dual branch after the residual", "position table rebuilt"]


@pytest.mark.torch
@pytest.mark.parametrize("mistake", CONTROLS)
def test_the_tolerance_notices(mistake, oracle, wrong, monkeypatch):
    config, params, batch, theirs = both("two_dual_no_joint", oracle)
    context = contextlib.nullcontext()
    if mistake == "exact GELU":
        monkeypatch.setattr(layers, "gelu", wrong.gelu)
    elif mistake == "norm_out swapped":
        monkeypatch.setattr(mmdit, "continuous", wrong.continuous)
    elif mistake == "position table rebuilt":
        params["pos_embed"]["pos_embed"] = position_table(config)
    else:
        context = dual_after_the_residual()
    with context:
        ours = velocity(MMDiT(config))(params, *batch)
    # Ten times what passes; the exact GELU gives 1.4e-4, the others more than 0.1.
    assert oracle.difference(ours, theirs) > 1e-4


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
    expanded = np.concatenate([tokens[:, :-1], np.repeat(tokens[:, -1:], 50, 1)], 1)
    net = MMDiT(config)
    compact = velocity(net, repeats=50)(params, x, t, tokens, pooled)
    full = velocity(net)(params, x, t, expanded, pooled)
    assert jnp.abs(compact - full).max() <= 1e-5 * jnp.abs(full).max()  # rounding of two summation orders
    once = velocity(net)(params, x, t, tokens, pooled)
    assert jnp.abs(once - full).max() > 1e-3 * jnp.abs(full).max()


def gradient(net, params, batch):
    def loss(p):
        return jnp.square(net.apply({"params": p}, *batch)).mean()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.slow
def test_rematerialisation_keeps_the_gradient():
    config = MMDiTConfig.from_json(TINY)
    params, batch = random_params(config), inputs(config, 2, 2)
    plain = gradient(MMDiT(config), params, batch)
    assert not plain["pos_embed"]["pos_embed"].any()  # the table is not learned
    assert plain["pos_embed"]["proj"]["kernel"].any()
    for remat in ("dots", "full"):
        again = gradient(MMDiT(config, remat=remat), params, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_vmap_over_candidates_equals_the_folded_batch():
    config = MMDiTConfig.from_json(TINY)
    params, (x, t, tokens, pooled) = random_params(config), inputs(config, 2, 2)
    xs, call = np.stack([x, 2 * x, -x]), velocity(MMDiT(config))
    mapped = jax.jit(jax.vmap(call, (None, 0, None, None, None)))(params, xs, t, tokens, pooled)
    looped = np.stack([call(params, one, t, tokens, pooled) for one in xs])
    np.testing.assert_allclose(mapped, looped, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32():
    config = MMDiTConfig.from_json(TINY)
    params, batch = random_params(config), inputs(config, 2, 2)
    full = velocity(MMDiT(config))(params, *batch)
    half = velocity(MMDiT(config, dtype=jnp.bfloat16))(params, *batch)
    assert half.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(half - full) / jnp.linalg.norm(full) < 0.03  # torch: 0.7-1.0 % RMS


def test_an_unknown_rematerialisation_is_refused():
    config = MMDiTConfig.from_json(TINY)
    with pytest.raises(UserError, match='try "full"'):
        jax.eval_shape(MMDiT(config, remat="fulll").init, jax.random.key(0), *inputs(config, 2, 2))


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
        jax.eval_shape(MMDiT(config).init, jax.random.key(0), *inputs(config, 5, 4))
