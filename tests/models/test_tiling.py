"""Tiled decoding and encoding: diffusers' tiles, seams included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.hub import functions, tables, weights
from smart_grpo_jax.models import tiling
from smart_grpo_jax.models.presets import preset


@pytest.mark.torch
def test_tiles_are_those_of_diffusers(oracle):
    """Two rows and two columns of tiles; the second column is narrower than what tiles share."""
    import diffusers

    from smart_grpo_jax.models.presets import TINY

    data = {**TINY["vae"], "sample_size": 16}
    config = dataclasses.replace(preset("tiny")["vae"], sample_size=16)
    theirs = oracle.random(diffusers.AutoencoderKL(**data))
    theirs.enable_tiling()
    params = tables.to_params(weights.VAE, config, oracle.reader(theirs))
    z = np.random.default_rng(0).standard_normal((2, 9, 7, 4)).astype(np.float32)
    raw = z / config.scaling_factor + config.shift_factor
    ours = jax.jit(functions.decode_fn(config, True))(params, jnp.asarray(z))
    want = theirs.decode(oracle.torch(raw).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
    oracle.assert_close(ours, (want / 2 + 0.5).clamp(0, 1), 5e-5)
    whole = jax.jit(functions.decode_fn(config))(params, jnp.asarray(z))
    assert np.abs(ours - whole).max() > 1e-3  # tiles do not see each other

    images = np.random.default_rng(1).uniform(size=(1, 18, 14, 3)).astype(np.float32)
    x0 = jax.jit(functions.encode_images_fn(config, True))(params, jnp.asarray(images))
    moments = theirs.encode(oracle.torch(images * 2 - 1).permute(0, 3, 1, 2)).latent_dist.mean
    want = (moments.permute(0, 2, 3, 1) - config.shift_factor) * config.scaling_factor
    oracle.assert_close(x0, want, 5e-5)


def test_an_image_of_one_tile_is_not_cut():
    calls = []
    x = jnp.ones((1, 8, 8, 3))
    assert tiling.tiled(lambda tile: calls.append(tile.shape) or tile, x, 8, 8) is x
    assert calls == [(1, 8, 8, 3)]
