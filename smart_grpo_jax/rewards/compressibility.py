"""JPEG size as a reward, estimated in the graph: what a file would cost, without writing it.

Flow-GRPO's scale: a file of s kilobytes (quality 95) has compressibility -s / 500. The estimate follows
the codec: YCbCr with chroma halved, 8 x 8 cosine transform, quantisation with the standard tables, then
the bits of the entropy coder by rule of thumb instead of Huffman tables.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards.base import Reward, no_prompt, without_weights

BLOCK = 8
LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMINANCE = np.full((BLOCK, BLOCK), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
"""Quantisation tables of the JPEG standard, annex K."""

HEADER_BYTES = 623
"""What a colour file costs before its first block."""
CODE_BITS = 3.0
"""Huffman code of a nonzero coefficient (on average), beside its magnitude bits."""
END_BITS = 3.0
"""Code that ends a block."""
KILOBYTES_PER_POINT = 500.0


def quantisation(table: np.ndarray, quality: int) -> np.ndarray:
    """The table as libjpeg scales it for a quality of 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((table * scale + 50) // 100, 1, 255)


def _cosines() -> np.ndarray:
    k, x = np.arange(BLOCK)[:, None], np.arange(BLOCK)[None]
    basis = np.cos((2 * x + 1) * k * np.pi / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _plane_bits(plane: Float[Array, "b H W"], table: np.ndarray) -> Float[Array, " b"]:
    """Bits of one plane in [-128, 127], sides multiples of 8.

    A coefficient q ≠ 0 costs its magnitude bits ⌊log2|q|⌋ + 1 and a code; the mean of a block is coded
    as the difference to the block before.
    """
    b, height, width = plane.shape
    blocks = plane.reshape(b, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(0, 1, 3, 2, 4)
    blocks = blocks.reshape(b, -1, BLOCK, BLOCK)
    basis = _cosines()
    waves = jnp.einsum("ij,bnjk,lk->bnil", basis, blocks, basis, precision=jax.lax.Precision.HIGHEST)
    level = jnp.round(waves / table)
    mean = level[..., 0, 0]
    level = level.at[..., 0, 0].set(jnp.diff(mean, axis=1, prepend=0.0))
    magnitude = jnp.abs(level)
    bits = jnp.where(magnitude > 0, jnp.floor(jnp.log2(jnp.maximum(magnitude, 1.0))) + 1 + CODE_BITS, 0.0)
    return bits.sum((1, 2, 3)) + END_BITS * blocks.shape[1]


def kilobytes(images: Float[Array, "b H W 3"], quality: int = 95) -> Float[Array, " b"]:
    """Estimated size of each image as a JPEG file, in units of 1,000 bytes."""
    pixels = jnp.round(jnp.clip(images.astype(jnp.float32), 0.0, 1.0) * 255)
    bottom, right = -pixels.shape[1] % (2 * BLOCK), -pixels.shape[2] % (2 * BLOCK)
    pixels = jnp.pad(pixels, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    b, height, width = light.shape
    bits = _plane_bits(light - 128, quantisation(LUMINANCE, quality))
    for chroma in ((blue - light) * 0.564, (red - light) * 0.713):
        half = chroma.reshape(b, height // 2, 2, width // 2, 2).mean((2, 4))
        bits = bits + _plane_bits(half, quantisation(CHROMINANCE, quality))
    return (HEADER_BYTES + bits / 8) / 1000


def _reward(name: str, sign: float, path: str | None, quality: int) -> Reward:
    without_weights(name, path)
    if not 1 <= quality <= 100:
        raise UserError(f"reward {name}: got quality {quality}, want 1 to 100 (try 95)")

    def score(params: PyTree, images: Float[Array, "b H W 3"], ctx: PyTree, t: Array | None = None) -> Scores:
        size = kilobytes(images, quality)
        finite = jnp.isfinite(images).all((1, 2, 3))
        return Scores(sign * size / KILOBYTES_PER_POINT, finite, {"kilobytes": size})

    return Reward(name, {}, no_prompt, score, uses_prompt=False)


def build(path: str | None = None, dtype: str = "float32", quality: int = 95) -> Reward:
    """Minus the file size: simple pictures win."""
    return _reward("compressibility", -1.0, path, quality)


def build_negated(path: str | None = None, dtype: str = "float32", quality: int = 95) -> Reward:
    """Plus the file size: busy pictures win."""
    return _reward("incompressibility", 1.0, path, quality)
