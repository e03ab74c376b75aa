"""A large image through the VAE in overlapping tiles, each as large as the model was trained on.

Neighbouring tiles share a quarter of their side, over which one fades into the other:

    out = a·(1 - y/n) + b·y/n      for the n shared rows (then columns), a the tile above (left of) b

Tiles do not see each other, so the result is not that of the whole image: off unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.models.vae import VAEConfig

OVERLAP = 0.25


def decode(
    run: Callable[[Array], Array], z: Float[Array, "b h w c"], config: VAEConfig
) -> Float[Array, "b H W 3"]:
    """`run` (raw latents → pixels) over tiles of latents; at once where one tile holds everything."""
    return tiled(run, z, config.sample_size // config.factor, config.sample_size)


def encode(
    run: Callable[[Array], Array], images: Float[Array, "b H W 3"], config: VAEConfig
) -> Float[Array, "b h w c"]:
    """`run` (pixels → moments or means) over tiles of pixels."""
    return tiled(run, images, config.sample_size, config.sample_size // config.factor)


def tiled(run: Callable[[Array], Array], x: Array, side: int, side_out: int) -> Array:
    """Tiles of `side` that become tiles of `side_out`, blended and joined."""
    if max(x.shape[1:3]) <= side:
        return run(x)
    step, shared = int(side * (1 - OVERLAP)), int(side_out * OVERLAP)
    kept = side_out - shared
    done: list[list[Array]] = []
    for top in range(0, x.shape[1], step):
        row: list[Array] = []
        for left in range(0, x.shape[2], step):
            tile = run(x[:, top : top + side, left : left + side])
            if done:
                tile = blend(done[-1][len(row)], tile, shared, axis=1)
            if row:
                tile = blend(row[-1], tile, shared, axis=2)
            row.append(tile)
        done.append(row)
    strips = [jnp.concatenate([tile[:, :kept, :kept] for tile in row], 2) for row in done]
    return jnp.concatenate(strips, 1)


def blend(before: Array, after: Array, shared: int, axis: int) -> Array:
    """`after`, its first `shared` rows or columns faded in over the last ones of `before`."""
    shared = min(before.shape[axis], after.shape[axis], shared)
    if shared == 0:
        return after
    shape = [1] * after.ndim
    shape[axis] = shared
    weight = (jnp.arange(shared) / shared).reshape(shape)
    old, new, rest = (
        jnp.take(before, jnp.arange(before.shape[axis] - shared, before.shape[axis]), axis),
        jnp.take(after, jnp.arange(shared), axis),
        jnp.take(after, jnp.arange(shared, after.shape[axis]), axis),
    )
    return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis)
