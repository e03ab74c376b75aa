"""The painter of the shapes world: scenes become pictures. The judges' templates come from here too."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.worlds.shapes.scenes import OBJECTS, SIZE, Scene

GROUND = 0.08
"""Grey level of the ground: not black, so that a wrong ground can err to both sides."""

PALETTE = np.array(
    [
        [0.95, 0.10, 0.10],
        [0.10, 0.85, 0.15],
        [0.15, 0.20, 0.95],
        [0.95, 0.90, 0.10],
        [0.90, 0.15, 0.85],
        [0.10, 0.85, 0.90],
    ],
    np.float32,
)
"""The six colours in the order of `grammar.COLOURS`, near the corners of the RGB cube: the pairs that
are closest differ by 0.75 in one channel."""

SQUARE_HALF = 0.88
CROSS_ARM = 0.36
TRIANGLE_BASE = 0.8
TRIANGLE_SLOPE = 1.0 + TRIANGLE_BASE


def distances(
    dx: Float[Array, "*b p"], dy: Float[Array, "*b p"], radius: Float[Array, "*b 1"]
) -> list[Float[Array, "*b p"]]:
    """Signed distance in pixels to the edge of each shape (negative inside), in the order of
    `grammar.SHAPES`; dx, dy are the offsets from the object's position, y grows downwards."""
    x, y = jnp.abs(dx), jnp.abs(dy)
    arm = CROSS_ARM * radius
    flank = (TRIANGLE_SLOPE * x - dy - radius) / (1 + TRIANGLE_SLOPE**2) ** 0.5
    return [
        jnp.sqrt(dx**2 + dy**2 + 1e-12) - radius,
        jnp.maximum(x, y) - SQUARE_HALF * radius,
        jnp.maximum(dy - TRIANGLE_BASE * radius, flank),
        jnp.maximum(jnp.maximum(x, y) - radius, jnp.minimum(x, y) - arm),
    ]


def masks(
    position: Float[Array, "*b 2"], radius: Float[Array, "*b"], shape: Int[Array, "*b"]
) -> Float[Array, "*b 576"]:
    """How much of each pixel an object covers: ½ - distance, clipped to [0, 1] (exact for straight
    edges along the axes, within a few per cent elsewhere)."""
    y, x = np.divmod(np.arange(SIZE**2), SIZE)
    dx = x + 0.5 - position[..., 0, None]
    dy = y + 0.5 - position[..., 1, None]
    every = distances(cast(Array, dx), cast(Array, dy), radius[..., None])
    distance = jnp.select([shape[..., None] == i for i in range(len(every))], every)
    return jnp.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene) -> Float[Array, "n 24 24 3"]:
    """Pictures in [0, 1]. Objects never overlap, so their order does not matter: each covers a part of
    the ground, and light adds up."""
    there = jnp.arange(OBJECTS) < scene.count[:, None]
    cover = masks(scene.position, scene.radius, scene.shape) * there[..., None]
    light = jnp.asarray(PALETTE)[scene.colour] * scene.brightness[..., None] - GROUND
    image = GROUND + jnp.einsum("nop,noc->npc", cover, light)
    return jnp.clip(image, 0.0, 1.0).reshape(-1, SIZE, SIZE, 3)
