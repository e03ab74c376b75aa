"""The FLUX transformer against diffusers, and what must hold without it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import streaming, tables, weights
from smart_grpo_jax.hub.families import family_of
from smart_grpo_jax.models import embeddings, flux, layers, lora
from smart_grpo_jax.models.clip import CLIPConfig
from smart_grpo_jax.models.flux import Flux, FluxConfig
from smart_grpo_jax.models.lora import FLUX_TARGETS, LoRA
from smart_grpo_jax.models.presets import TINY_FLUX, preset
from smart_grpo_jax.models.t5 import T5Config
from smart_grpo_jax.models.vae import VAEConfig

DEV = TINY_FLUX["transformer"]

# Odd numbers of heads, axes of other lengths, with and without guidance, without one kind of blocks.
CONFIGS = {
    "dev": DEV,
    "schnell": dict(
        in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=5,
        joint_attention_dim=9, pooled_projection_dim=7, guidance_embeds=False, axes_dims_rope=[6, 4, 2],
    ),
    "no_double": dict(
        in_channels=8, num_layers=0, num_single_layers=2, attention_head_dim=10, num_attention_heads=1,
        joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=[2, 2, 6],
    ),
    "no_single": dict(
        in_channels=4, num_layers=2, num_single_layers=0, attention_head_dim=20, num_attention_heads=2,
        joint_attention_dim=11, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=[4, 8, 8],
    ),
    "no_blocks": dict(
        in_channels=4, num_layers=0, num_single_layers=0, attention_head_dim=6, num_attention_heads=2,
        joint_attention_dim=3, pooled_projection_dim=4, axes_dims_rope=[2, 2, 2],
    ),
}  # fmt: skip
SIZES = {"dev": (6, 10), "schnell": (8, 2), "no_double": (2, 12), "no_single": (10, 4), "no_blocks": (2, 4)}


def inputs(config, height, width, length=6, batch=3):
    """Latents, times, tokens, pooled text, and guidance where the network takes it."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, height, width, config.latent_channels), np.float32)
    tokens = rng.standard_normal((batch, length, config.joint_attention_dim), np.float32)
    pooled = rng.standard_normal((batch, config.pooled_projection_dim), np.float32)
    t = np.linspace(0.13, 0.97, batch, dtype=np.float32)
    guidance = np.linspace(1.3, 5.9, batch, dtype=np.float32)
    return (x, t, tokens, pooled, guidance) if config.guidance_embeds else (x, t, tokens, pooled)


def random_params(config):
    """Every leaf random and of unit gain, so that no branch is hidden behind a small gate."""
    rng = np.random.default_rng(0)

    def leaf(path, s):
        noise = rng.standard_normal(s.shape, np.float32)
        if path[-1] == "kernel":
            return noise / s.shape[-2] ** 0.5
        return 0.2 * noise + float(path[-1] == "scale")

    shapes = flatten_dict(weights.flux_shapes(config))
    return unflatten_dict({path: leaf(path, s) for path, s in shapes.items()})


def velocity(net, **static):
    """The network as one compiled function of (params, x, t, tokens, pooled[, guidance])."""
    return jax.jit(lambda params, *batch: net.apply({"params": params}, *batch, **static))


def published_velocity(net, batch, oracle):
    """v[b,h,w,c] of diffusers' network; latents packed and unpacked by diffusers' pipeline."""
    from diffusers import FluxPipeline

    x, t, tokens, pooled, *guidance = (oracle.torch(a) for a in batch)
    b, h, w, c = x.shape
    packed = FluxPipeline._pack_latents(x.permute(0, 3, 1, 2).contiguous(), b, c, h, w)
    v = net(
        hidden_states=packed,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        timestep=t,
        img_ids=FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", packed.dtype),
        txt_ids=packed.new_zeros(tokens.shape[1], 3),
        guidance=guidance[0] if guidance else None,
    ).sample
    return FluxPipeline._unpack_latents(v, h, w, 1).permute(0, 2, 3, 1)


def both(name, size, oracle):
    """A random network as (config, params, batch, the velocity of diffusers)."""
    from diffusers import FluxTransformer2DModel

    config = FluxConfig.from_json(CONFIGS[name])
    options = {key: value for key, value in CONFIGS[name].items() if key != "_class_name"}
    net = oracle.random(FluxTransformer2DModel(**options))
    params = tables.to_params(weights.FLUX, config, oracle.reader(net))
    batch = inputs(config, *size)
    return config, params, batch, published_velocity(net, batch, oracle)


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_equals_diffusers(name, oracle):
    config, params, batch, theirs = both(name, SIZES[name], oracle)
    ours = velocity(Flux(config))(params, *batch)
    assert ours.dtype == jnp.float32
    oracle.assert_close(ours, theirs, 1e-5)  # measured: at most 2e-6, float32 rounding


@pytest.mark.torch
def test_a_network_read_in_pieces_of_its_tensors_is_the_same(oracle, monkeypatch):
    from diffusers import FluxTransformer2DModel

    config = FluxConfig.from_json(CONFIGS["no_blocks"])
    reader = oracle.reader(oracle.random(FluxTransformer2DModel(**CONFIGS["no_blocks"])))
    whole = tables.to_params(weights.FLUX, config, reader)
    monkeypatch.setattr(streaming, "PIECE", 100)
    jax.tree.map(np.testing.assert_array_equal, tables.to_params(weights.FLUX, config, reader), whole)


def half_split(x, turns):
    """Feature j paired with j + d/2 instead of its neighbour."""
    cos, sin = (a[None, :, None] for a in turns)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def image_first(config, rows, columns, text):
    """The positions of [image, text], though the tokens are [text, image]."""
    return tuple(np.roll(table, -text, 0) for table in ROTATIONS(config, rows, columns, text))


def rounded(t, *frequencies):
    """The sinusoid of a time that went through bfloat16; guidance comes with frequencies of its own."""
    coarse = 1000 * (t / 1000).astype(jnp.bfloat16).astype(t.dtype)
    return SINUSOID(t if frequencies else coarse, *frequencies)


ROTATIONS, SINUSOID = flux.rotations, embeddings.sinusoid

CONTROLS = {
    "exact GELU in the double blocks": (layers, "gelu", lambda wrong: wrong.gelu),
    "exact GELU in the single blocks": (flux, "gelu", lambda wrong: wrong.gelu),
    "norm_out swapped": (flux, "continuous", lambda wrong: wrong.continuous),
    "half-split rotations": (flux, "rotate", lambda wrong: half_split),
    "positions of the image before those of the text": (flux, "rotations", lambda wrong: image_first),
    "times in bfloat16": (embeddings, "sinusoid", lambda wrong: rounded),
}


@pytest.mark.torch
@pytest.mark.parametrize("mistake", CONTROLS)
def test_the_tolerance_notices(mistake, oracle, wrong, monkeypatch):
    config, params, batch, theirs = both("dev", SIZES["dev"], oracle)
    module, name, make = CONTROLS[mistake]
    monkeypatch.setattr(module, name, make(wrong))
    ours = velocity(Flux(config))(params, *batch)
    # Ten times what passes; the exact GELU gives 1.1e-4 and 1.5e-4, the others more than 0.1.
    assert oracle.difference(ours, theirs) > 1e-4


@pytest.mark.torch
def test_the_sinusoid_of_guidance_has_the_frequencies_of_diffusers(oracle):
    from diffusers.models.embeddings import get_timestep_embedding

    numbers = np.linspace(0, 10_000, 201, dtype=np.float32)
    theirs = get_timestep_embedding(oracle.torch(numbers), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    published, nearest = (
        np.abs(np.asarray(SINUSOID(numbers, f)) - theirs.numpy()).max()
        for f in (embeddings.PUBLISHED, embeddings.NEAREST)
    )
    assert published <= 2e-7  # cos and sin of equal angles
    assert nearest > 1e-4  # one unit in the last place of three frequencies


@pytest.mark.torch
def test_rotations_equal_diffusers_at_the_published_size(oracle):
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    config, rows, columns, text = FluxConfig(), 5, 128, 3
    ids = np.zeros((text + rows * columns, 3), np.float32)
    ids[text:, 1], ids[text:, 2] = np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)
    theirs = FluxPosEmbed(10000, list(config.axes_dims_rope))(oracle.torch(ids))
    for ours, table in zip(flux.rotations(config, rows, columns, text), theirs, strict=True):
        assert ours.dtype == np.float32
        # One unit in the last place; float32 angles would be 7e-6 off.
        np.testing.assert_allclose(np.repeat(ours, 2, -1), table.numpy(), rtol=0, atol=6e-8)


@pytest.mark.torch
def test_an_omitted_key_has_the_default_of_diffusers():
    from diffusers import FluxTransformer2DModel

    parameters = inspect.signature(FluxTransformer2DModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}
    assert dataclasses.asdict(FluxConfig.from_json({})) == theirs


def test_unpacking_undoes_packing():
    x = np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    tokens = flux.pack(x)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(flux.unpack(tokens, 4, 6), x)
    np.testing.assert_array_equal(tokens[0, 1, :4], x[0, :2, 2:4, 0].ravel())  # channel by channel


def test_repeats_equal_the_expanded_sequence():
    config = FluxConfig.from_json(DEV)
    params = random_params(config)
    x, t, tokens, *rest = inputs(config, 4, 2)
    expanded = np.concatenate([tokens[:, :-1], np.repeat(tokens[:, -1:], 50, 1)], 1)
    net = Flux(config)
    compact = velocity(net, repeats=50)(params, x, t, tokens, *rest)
    full = velocity(net)(params, x, t, expanded, *rest)
    assert jnp.abs(compact - full).max() <= 1e-5 * jnp.abs(full).max()  # rounding of two summation orders
    once = velocity(net)(params, x, t, tokens, *rest)
    assert jnp.abs(once - full).max() > 1e-3 * jnp.abs(full).max()


def gradient(net, params, batch):
    def loss(p):
        return jnp.square(net.apply({"params": p}, *batch)).mean()

    return jax.jit(jax.grad(loss))(params)


def test_every_parameter_has_a_finite_gradient():
    config = FluxConfig.from_json(DEV)
    plain = gradient(Flux(config), random_params(config), inputs(config, 2, 4))
    for path, leaf in flatten_dict(plain, sep="/").items():
        assert np.isfinite(leaf).all() and np.asarray(leaf).any(), path


@pytest.mark.slow
def test_rematerialisation_keeps_the_gradient():
    config = FluxConfig.from_json(DEV)
    params, batch = random_params(config), inputs(config, 2, 4)
    plain = gradient(Flux(config), params, batch)
    for remat in ("dots", "full"):
        again = gradient(Flux(config, remat=remat), params, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_rematerialisation_and_chunks_of_queries_keep_the_velocity():
    config = FluxConfig.from_json(DEV)
    params, batch = random_params(config), inputs(config, 2, 4)
    plain = velocity(Flux(config), repeats=9)(params, *batch)
    again = velocity(Flux(config, remat="dots", attention="chunked"), repeats=9)(params, *batch)
    np.testing.assert_allclose(again, plain, rtol=0, atol=1e-5 * jnp.abs(plain).max())  # order of sums


def test_bfloat16_stays_near_float32():
    config = FluxConfig.from_json(DEV)
    params, batch = random_params(config), inputs(config, 4, 6)
    full = velocity(Flux(config))(params, *batch)
    half = velocity(Flux(config, dtype=jnp.bfloat16))(params, *batch)
    assert half.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(half - full) / jnp.linalg.norm(full) < 0.02  # torch: 0.7-1.0 % RMS


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_equals_its_merge():
    config = FluxConfig.from_json(DEV)
    params, batch = random_params(config), inputs(config, 2, 4)
    spec, net = LoRA(2, 6.0, FLUX_TARGETS), Flux(config, 2, 6.0)
    tree = lora.init_lora(jax.random.key(0), net, spec, *batch)
    adapted = jax.jit(lambda tree: net.apply({"params": params, "lora": tree}, *batch))
    plain = velocity(Flux(config))(params, *batch)
    # The product with b = 0 is an exact 0, but it may be compiled to another order of sums.
    np.testing.assert_allclose(adapted(tree), plain, rtol=0, atol=1e-6 * jnp.abs(plain).max())
    tree = jax.tree.map(lambda a: a + 0.1, tree)
    merged = velocity(Flux(config))(lora.merge(params, tree, spec.scale), *batch)
    assert jnp.abs(merged - plain).max() > 0.1
    np.testing.assert_allclose(adapted(tree), merged, rtol=0, atol=1e-5 * jnp.abs(merged).max())


@pytest.mark.parametrize(
    ("name", "parameters"), [("flux-dev", 11_901_408_320), ("flux-schnell", 11_891_178_560)]
)
def test_the_published_sizes(name, parameters):
    config = preset(name)["transformer"]
    leaves = jax.tree.leaves(weights.flux_shapes(config))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == parameters


SD3_TEXT, FLUX_TEXT = (CLIPConfig, CLIPConfig, T5Config), (CLIPConfig, T5Config)


@pytest.mark.parametrize(
    ("name", "text"), [("sd35-medium", SD3_TEXT), ("sd35-large", SD3_TEXT), ("flux-dev", FLUX_TEXT)]
)
def test_every_component_of_a_published_pipeline_is_in_its_preset(name, text):
    transformer, vae, *encoders = (parts := preset(name)).values()
    assert set(parts) == set(family_of(transformer).networks)
    assert isinstance(vae, VAEConfig) and tuple(map(type, encoders)) == text
    assert encoders[-1].d_model == transformer.joint_attention_dim


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flux-dev", (16, 2, None, 128, True)),
        ("flux-schnell", (16, 2, None, 128, False)),
        ("tiny-flux", (4, 2, None, 128, True)),
        ("sd35-medium", (16, 2, 384, 128, False)),
        ("tiny", (4, 1, 5, 3, False)),
    ],
)
def test_both_families_answer_the_same_questions(name, says):
    parts = preset(name)
    c = parts["transformer"]
    assert (c.latent_channels, c.token_side, c.longest_side, c.default_side, c.embeds_guidance) == says
    assert c.latent_channels == parts["vae"].latent_channels
    assert parts["text_encoder"].projection == (not isinstance(c, FluxConfig))


def test_the_vae_of_flux_has_its_own_normalisation():
    sd3, dev = preset("sd35-medium")["vae"], preset("flux-dev")["vae"]
    assert (dev.scaling_factor, dev.shift_factor) == (0.3611, 0.1159)
    assert dataclasses.replace(dev, scaling_factor=1.5305, shift_factor=0.0609) == sd3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"patch_size": 2}, "patch_size: got 2, wanted 1"),
        ({"in_channels": 18}, "in_channels: got 18, wanted a multiple of 4"),
        ({"in_channels": 0}, "in_channels: got 0, wanted 4 or more"),
        ({"out_channels": 4}, "out_channels: got 4, wanted None or in_channels = 16"),
        ({"num_layers": -1}, "num_layers: got -1"),
        ({"num_attention_heads": 0}, "num_attention_heads: got 0"),
        ({"axes_dims_rope": [3, 3, 2]}, "three even numbers"),
        ({"axes_dims_rope": [2, 2, 2]}, "the sum attention_head_dim = 8"),
        ({"axes_dims_rope": [4, 4]}, "axes_dims_rope"),
        ({"axes_dims_rope": [-2, 2, 8]}, "axes_dims_rope"),
        ({"qk_norm": "rms_norm"}, "unknown feature qk_norm"),
    ],
)
def test_what_is_impossible_or_not_built_is_refused(change, match):
    with pytest.raises(UserError, match=match):
        FluxConfig.from_json(DEV | change)


def refused(net, *batch):
    with pytest.raises(UserError) as caught:
        jax.eval_shape(net.init, jax.random.key(0), *batch)
    return caught.value.line


def test_inputs_that_the_network_cannot_take_are_refused():
    dev, schnell = (Flux(FluxConfig.from_json(CONFIGS[name])) for name in ("dev", "schnell"))
    assert "5×4×4, wanted multiples of 2" in refused(dev, *inputs(dev.config, 5, 4))
    assert "4×3×4, wanted multiples of 2" in refused(dev, *inputs(dev.config, 4, 3))
    x, *rest = inputs(dev.config, 4, 4)
    assert "4 channels" in refused(dev, x[..., :3], *rest)
    assert "guidance: got none" in refused(dev, x, *rest[:3])
    assert "guidance: got numbers" in refused(schnell, *inputs(schnell.config, 4, 4), rest[3])
    assert 'try "full"' in refused(dataclasses.replace(dev, remat="fulll"), x, *rest)
