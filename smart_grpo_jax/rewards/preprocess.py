"""Images as the published rewards see them: 8-bit, resized by Pillow, cropped, normalised, inside jit.

Pillow resizes 8-bit images in integers: weights are rounded to 22 bits, the horizontal pass is rounded and
clipped to 0..255 before the vertical one starts. `exact` repeats that arithmetic bit for bit. A 22-bit weight
is split into three signed digits of 8 bits, so that every product and every partial sum of the three matrix
products is an integer below 2²⁴, which float32 holds exactly, whatever the order of summation.

Width comes first, always: so did every Pillow that the published scores were computed with. Pillow 13 begins
with the height where an image is taller than 2:1, which moves hard edges by up to 15 levels of 255.

Shapes are static: the weights of a pass are made at trace time, in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

HEIGHT, WIDTH = 1, 2
"""Axes of a batch of images."""

BITS = 22
"""Fraction bits of Pillow's weights: 32, less 8 for the pixel and 2 for the overshoot of a cubic."""

SUPPORT = 2.0
"""Half-width of the cubic, in pixels of the coarser grid."""

CROPS: Mapping[str, Callable[[int], int]] = {
    "tv": lambda spare: round(spare / 2),  # torchvision: half to even
    "hf": lambda spare: spare // 2,  # the image processors of transformers
}
"""First row of a centre crop, from the number of rows to drop. They differ where that is 3 mod 4."""


def preprocess(
    images: Float[Array, "b h w 3"],
    size: int,
    *,
    rule: str,
    mode: str = "exact",
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> Float[Array, "b size size 3"]:
    """Images in [0, 1] → float32 input of a vision tower.

    8-bit rounding, shorter side to `size`, centre crop by `rule` (CROPS), (x - mean) / std. `mode` (RESIZES):
    `exact` is Pillow; `fast` one float pass that rounds once, at the end; `float` neither rounds nor clips.
    Rounding is straight-through: gradients are those of the unrounded arithmetic. An image with a NaN in it
    is NaN all over, so that its score is missing instead of wrong.
    """
    if rule not in CROPS:
        raise UserError(f"preprocess: rule: got {rule!r}, {nearest(rule, CROPS)}")
    if mode not in RESIZES:
        raise UserError(f"preprocess: mode: got {mode!r}, {nearest(mode, RESIZES)}")
    images = jnp.asarray(images, jnp.float32)
    missing = jnp.isnan(images).any(axis=(1, 2, 3), keepdims=True)
    pixels = straight_round(jnp.clip(255 * jnp.where(missing, 0, images), 0, 255))
    pixels = RESIZES[mode](pixels, *resized(images.shape[HEIGHT], images.shape[WIDTH], size))
    top, left = (CROPS[rule](pixels.shape[axis] - size) for axis in (HEIGHT, WIDTH))
    pixels = pixels[:, top : top + size, left : left + size]
    towers = (pixels / 255 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
    return jnp.where(missing, jnp.nan, towers)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What one original does to its images."""

    rule: str
    mode: str
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(
        self, images: Float[Array, "b h w 3"], size: int, *, fast: bool = False
    ) -> Float[Array, "b size size 3"]:
        """Preprocess; `fast` leaves out Pillow's rounding between the passes, if this original has it."""
        mode = "fast" if fast and self.mode == "exact" else self.mode
        return preprocess(images, size, rule=self.rule, mode=mode, mean=self.mean, std=self.std)


PIPELINES: Mapping[str, Pipeline] = {
    "image_reward": Pipeline("tv", "exact"),
    "clip": Pipeline("hf", "exact"),
    "hps": Pipeline("tv", "float"),
}
"""`clip`: every reward that goes through the image processor of transformers. `hps` turns its 8-bit image to
floats before it resizes, and keeps the overshoot."""


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `size`; the longer one is truncated to a whole number."""
    short = min(height, width)
    if size < 1 or short < 1:
        raise UserError(f"preprocess: got {height}x{width} images and size {size}, wanted at least 1 pixel")
    return size * height // short, size * width // short


def straight_round(pixels: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round half to even; the gradient is that of the identity."""
    return pixels + jax.lax.stop_gradient(jnp.round(pixels) - pixels)


def resize_exact(pixels: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b H W c"]:
    """Pillow's resize of 8-bit images: width first, whole levels after each pass."""
    return eight_bit_pass(eight_bit_pass(pixels, width, WIDTH), height, HEIGHT)


def resize_fast(pixels: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b H W c"]:
    """Both passes in floats, clipped and rounded once."""
    return straight_round(jnp.clip(resize_float(pixels, height, width), 0, 255))


def resize_float(pixels: Float[Array, "b h w c"], height: int, width: int) -> Float[Array, "b H W c"]:
    """Both passes in floats; a hard edge overshoots."""
    return float_pass(float_pass(pixels, width, WIDTH), height, HEIGHT)


RESIZES: Mapping[str, Callable[..., Float[Array, "b H W c"]]] = {
    "exact": resize_exact,
    "fast": resize_fast,
    "float": resize_float,
}


def float_pass(pixels: Float[Array, "b h w c"], size: int, axis: int) -> Float[Array, "b H W c"]:
    """One axis to `size` by the antialiased cubic; nothing to do where it is there already."""
    if pixels.shape[axis] == size:
        return pixels
    return along(axis, jnp.asarray(cubic(pixels.shape[axis], size), jnp.float32), pixels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def eight_bit_pass(pixels: Float[Array, "b h w c"], size: int, axis: int) -> Float[Array, "b H W c"]:
    """One axis to `size` in Pillow's integers: (Σ weight · pixel + ½) >> 22, clipped to 0..255."""
    if pixels.shape[axis] == size:
        return pixels
    total = jnp.int32(1 << (BITS - 1))
    for digit, weights in enumerate(digits(pixels.shape[axis], size)):
        total += along(axis, jnp.asarray(weights, jnp.float32), pixels).astype(jnp.int32) << (8 * digit)
    return jnp.clip(total >> BITS, 0, 255).astype(pixels.dtype)


@eight_bit_pass.defjvp
def unrounded(size: int, axis: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Straight through: the tangent of the same pass without rounding."""
    smooth = lambda pixels: jnp.clip(float_pass(pixels, size, axis), 0, 255)
    return eight_bit_pass(*primals, size, axis), jax.jvp(smooth, primals, tangents)[1]


def along(axis: int, weights: Float[Array, "out in"], pixels: Float[Array, "b h w c"]) -> Array:
    """Matrix product over one axis of the images."""
    formula = {HEIGHT: "oh,bhwc->bowc", WIDTH: "ow,bhwc->bhoc"}[axis]
    return jnp.einsum(formula, weights, pixels, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=64)
def cubic(before: int, after: int) -> np.ndarray:
    """Weights [after, before] of Keys' cubic (a = -½); when shrinking it widens to cover the coarser pixel.

    Taps that fall off the edge are dropped, and the row is scaled to sum to one.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    first = np.maximum(np.trunc(centre - SUPPORT * stretch + 0.5), 0)
    last = np.minimum(np.trunc(centre + SUPPORT * stretch + 0.5), before)
    taps = np.arange(before)
    x = np.abs((taps - centre[:, None] + 0.5) * (1 / stretch))
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    weights *= (taps >= first[:, None]) & (taps < last[:, None])
    return weights / weights.sum(1, keepdims=True)


@functools.lru_cache(maxsize=64)
def digits(before: int, after: int) -> tuple[np.ndarray, ...]:
    """The weights in units of 2⁻²², as digits in [-128, 127] to the base 256, the lowest first."""
    weights = cubic(before, after) * (1 << BITS)
    rest = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)
    found = []
    for _ in range(2):
        digit = (rest + 128) % 256 - 128
        found.append(digit.astype(np.int8))
        rest = (rest - digit) // 256
    return (*found, rest.astype(np.int8))
