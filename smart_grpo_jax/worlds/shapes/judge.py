"""The judge of the shapes world: does a picture show what its prompt asks for? In a graph, no weights.

Analysis by synthesis. Pixels get soft colours; four shape templates at 21 x 21 places are compared by
intersection over union, all in one matmul; the best places are taken one after the other, each
silencing its surroundings; the objects found are painted again, and what the painting leaves
unexplained lowers the score. The graded value rises smoothly from a blur that is going to be an object
to the finished one, so that it can lead a search on one-step decodes; the strict value is GenEval's
question: every attribute right, and nothing else in the picture.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.worlds.shapes.render import GROUND, PALETTE, distances, masks
from smart_grpo_jax.worlds.shapes.scenes import BRIGHTNESS, NUM_COLOURS, NUM_SHAPES, RADIUS, SIZE

GRID = 21
"""Places per axis, one pixel apart: 2 ... 22; whole objects lie at 3.2 ... 20.8, so each of their places has
neighbours to compare with."""
FOUND = 5
"""Objects looked for: one more than a prompt can ask for."""
SUPPRESS = 5.5
"""Pixels around a found object in which no other is looked for; neighbours are at least 7.2 apart."""

MEAN_LIGHT = sum(BRIGHTNESS) / 2
PATCH = 10
PAD = 3
"""A patch of 10 x 10 pixels around a place holds every object found there; places reach to 2 pixels from
the border, so 3 pixels of it may lie outside."""
SIZE_RANGE = 0.15
COLOUR_TEMPERATURE = 0.04
SHAPE_TEMPERATURE = 0.02
LIKENESS_FLOOR, LIKENESS_RANGE = 0.38, 0.30
"""Confidence rises from 0 to 1 between these: below lie blobs and debris, above every clean
object. A wide ramp, because one-step decodes at t = 0.9 live on it."""
PURITY_FREE, PURITY_SCALE = 0.03, 0.10
RESIDUAL_SCALE = 0.06
EXTRA_COST = 0.5
RELATION_FLOOR = 0.6
"""Share of a pair's score that is kept when the objects are right and their relation is wrong."""

STRICT_CONFIDENCE, STRICT_COLOUR, STRICT_SHAPE, STRICT_QUALITY = 0.5, 0.7, 0.5, 0.5
PRESENT = 0.3
"""Confidence from which something counts as an object that is there, wanted or not."""
MARGIN = 2.0
"""Pixels by which a relation must hold beyond half the offset along the other axis."""


class Verdict(NamedTuple):
    """graded in [0, 1]; strict 0 or 1; parts: what the graded value is made of."""

    graded: Float[Array, " b"]
    strict: Float[Array, " b"]
    parts: dict[str, Float[Array, " b"]]


class Objects(NamedTuple):
    """The five best objects of each picture; colour and shape are distributions. `unexplained` is the mean
    squared difference between the picture and these objects painted again on the ground: texture,
    ghosts, debris, a wrong ground, and whatever lies beyond the fifth object."""

    confidence: Float[Array, "b 5"]
    colour: Float[Array, "b 5 6"]
    shape: Float[Array, "b 5 4"]
    position: Float[Array, "b 5 2"]
    unexplained: Float[Array, " b"]


class _Templates(NamedTuple):
    shapes: np.ndarray
    windows: np.ndarray
    powers: np.ndarray
    areas: np.ndarray
    places: np.ndarray
    near: np.ndarray
    cross: np.ndarray


@functools.cache
def _templates() -> _Templates:
    """Constants: shapes [576, 4*441] and square windows [576, 441] at every place, sums of the shapes'
    squares and areas, places (x, y), which places silence each other, and each place's four
    neighbours."""
    axis = np.arange(GRID) + (SIZE - GRID + 1) // 2
    y, x = (a.ravel() for a in np.meshgrid(axis, axis, indexing="ij"))
    places = np.stack([x, y], -1).astype(np.float32)
    n = len(places)
    with jax.ensure_compile_time_eval():
        shapes = np.stack(
            [
                np.asarray(masks(jnp.asarray(places), jnp.full(n, RADIUS), jnp.full(n, s)))
                for s in range(NUM_SHAPES)
            ]
        )
    py, px = np.divmod(np.arange(SIZE**2), SIZE)
    reach = np.maximum(abs(px + 0.5 - places[:, :1]), abs(py + 0.5 - places[:, 1:]))
    row, column = np.divmod(np.arange(n), GRID)
    left, right = np.maximum(column - 1, 0), np.minimum(column + 1, GRID - 1)
    up, down = np.maximum(row - 1, 0), np.minimum(row + 1, GRID - 1)
    return _Templates(
        shapes=shapes.reshape(-1, SIZE**2).T,
        windows=(reach <= RADIUS + 0.6).astype(np.float32).T,
        powers=(shapes**2).sum(-1),
        areas=shapes.sum(-1).mean(-1),
        places=places,
        near=((places[:, None] - places[None]) ** 2).sum(-1) <= SUPPRESS**2,
        cross=np.stack([row * GRID + left, row * GRID + right, up * GRID + column, down * GRID + column], -1),
    )


def _smooth(images: Float[Array, "b 24 24 3"], t: Array) -> Float[Array, "b 24 24 3"]:
    """Binomial low-pass [1 2 1]/4 along both axes, mixed in with weight t: a one-step decode at noise
    level t carries pixel noise that is the network's error, not the picture's."""
    kernel = np.eye(SIZE) / 2 + (np.eye(SIZE, k=1) + np.eye(SIZE, k=-1)) / 4
    kernel[0, 0] = kernel[-1, -1] = 0.75
    low = jnp.einsum("ij,kl,bjlc->bikc", jnp.float32(kernel), jnp.float32(kernel), images)
    weight = jnp.asarray(t, jnp.float32).reshape(-1, 1, 1, 1)
    return images + weight * (low - images)


def _soft_colours(images: Float[Array, "b 24 24 3"]) -> Float[Array, "b 6 576"]:
    """How much of each pixel each colour covers.

    A pixel u above the ground is explained by a share a of colour c: a = u·c/|c|², clipped to [0, 1],
    leaving the stray part |u - a c|². The colours compete by softmax(-stray/τ), and what even the best
    leaves over costs purity: a colour between two of the palette is worth neither.
    """
    offset = images.reshape(-1, SIZE**2, 3) - GROUND
    red, green, blue = offset[..., 0], offset[..., 1], offset[..., 2]
    share, stray = [], []
    for c in PALETTE.astype(np.float64) * MEAN_LIGHT - GROUND:
        along = (red * c[0] + green * c[1] + blue * c[2]) / float(c @ c)
        along = jnp.clip(along, 0.0, 1.0)
        share.append(along)
        stray.append((red - along * c[0]) ** 2 + (green - along * c[1]) ** 2 + (blue - along * c[2]) ** 2)
    least = functools.reduce(jnp.minimum, stray)
    total = sum(jnp.exp((least - d) / COLOUR_TEMPERATURE) for d in stray)
    purity = jnp.exp(-jnp.maximum(least - PURITY_FREE, 0.0) / PURITY_SCALE) / total
    # Barriers: XLA would fuse, and so compute, what is used several times into each of its uses.
    least, purity = jax.lax.optimization_barrier((least, purity))
    planes = [
        a * jnp.exp((least - d) / COLOUR_TEMPERATURE) * purity for a, d in zip(share, stray, strict=True)
    ]
    return jax.lax.optimization_barrier(jnp.stack(planes, axis=1))


def detect(images: Float[Array, "b 24 24 3"]) -> Objects:
    """The five most object-like things in each picture.

    Likeness of soft masks f, g is Tanimoto's Σfg / (Σf² + Σg² - Σfg): 1 only where they are equal.
    """
    fixed = _templates()
    planes = _soft_colours(images)
    figure = planes.sum(1)
    overlap = (figure @ fixed.shapes).reshape(-1, NUM_SHAPES, GRID**2)
    power = figure**2 @ fixed.windows
    alike = overlap / (power[:, None] + fixed.powers - overlap)
    best = alike.max(1)
    found = []
    for _ in range(FOUND):
        place = jnp.argmax(best, axis=-1)
        best = jnp.where(jnp.asarray(fixed.near)[place], -1.0, best)
        found.append(place)
    return _examine(images - GROUND, planes, jnp.stack(found, axis=1), alike)


def _examine(offset: Array, planes: Array, place: Array, alike: Array) -> Objects:
    """A closer look at the found places: each shape is painted in a patch around the place, moved to where
    it fits best and grown to the area seen, so that only the form is compared."""
    fixed = _templates()
    shift = _between_places(alike, place)
    channels = jnp.moveaxis(offset, -1, 1).reshape(-1, 3, SIZE**2)
    seen = jax.lax.optimization_barrier(_patches(jnp.concatenate([planes, channels], 1), place))
    y, x = np.divmod(np.arange(PATCH**2), PATCH)
    dx = jnp.float32(x - PATCH / 2 + 0.5) - shift[..., 0, None]
    dy = jnp.float32(y - PATCH / 2 + 0.5) - shift[..., 1, None]
    near = jnp.clip(RADIUS + 1.1 - jnp.maximum(jnp.abs(dx), jnp.abs(dy)).mean(2), 0.0, 1.0)
    colours = seen[:, :, :NUM_COLOURS] * near[:, :, None]
    mass = colours.sum(-1)
    figure = colours.sum(2)
    size = jnp.sqrt(mass.sum(-1)[..., None] / fixed.areas)
    radius = RADIUS * jnp.clip(size, 1 - SIZE_RANGE, 1 + SIZE_RANGE)
    covers = [
        jnp.clip(0.5 - distances(dx[:, :, s], dy[:, :, s], radius[..., s, None])[s], 0.0, 1.0)
        for s in range(NUM_SHAPES)
    ]
    alike = jnp.stack([_tanimoto(figure, cover) for cover in covers], -1)
    confidence = jnp.clip((alike.max(-1) - LIKENESS_FLOOR) / LIKENESS_RANGE, 0.0, 1.0)
    colour = mass**3 / ((mass**3).sum(-1, keepdims=True) + 1e-6)

    likely = jnp.argmax(alike, axis=-1)
    cover = jnp.select([likely[..., None] == s for s in range(NUM_SHAPES)], covers) * confidence[..., None]
    light = colour @ (jnp.asarray(PALETTE) * MEAN_LIGHT) - GROUND * colour.sum(-1, keepdims=True)
    agreement = (cover[:, :, None] * seen[:, :, NUM_COLOURS:]).sum(-1)
    explained = 2 * (light * agreement).sum((1, 2)) - ((light**2).sum(-1) * (cover**2).sum(-1)).sum(1)
    return Objects(
        confidence=confidence,
        colour=colour,
        shape=jax.nn.softmax(alike / SHAPE_TEMPERATURE, axis=-1),
        position=jnp.asarray(fixed.places)[place]
        + jnp.take_along_axis(shift, likely[..., None, None], axis=2)[:, :, 0],
        unexplained=jnp.maximum((offset**2).sum((1, 2, 3)) - explained, 0.0) / (3 * SIZE**2),
    )


def _patches(planes: Float[Array, "b n 576"], place: Int[Array, "b 5"]) -> Float[Array, "b 5 n 100"]:
    """The pixels around each place; what lies outside the picture is 0. Slices, because a gather of
    single pixels takes four times as long on a CPU."""
    n = planes.shape[1]
    edge = ((0, 0), (0, 0), (PAD, PAD), (PAD, PAD))
    padded = jnp.pad(planes.reshape(-1, n, SIZE, SIZE), edge)
    corner = jnp.asarray(_templates().places, jnp.int32)[place] + (PAD - PATCH // 2)
    cut = lambda plane, at: jax.lax.dynamic_slice(plane, (0, at[1], at[0]), (n, PATCH, PATCH))
    return jax.vmap(jax.vmap(cut, (None, 0)))(padded, corner).reshape(-1, FOUND, n, PATCH**2)


def _tanimoto(f: Float[Array, "*b p"], g: Float[Array, "*b p"]) -> Float[Array, "*b"]:
    both = (f * g).sum(-1)
    return both / ((f**2).sum(-1) + (g**2).sum(-1) - both + 1e-6)


def _between_places(alike: Array, place: Array) -> Array:
    """Where each shape fits best between the places, [b,5,4,2] as an offset from the place.

    Around its maximum likeness falls about linearly on either side, y(x) = top - s|x - x0|, so
    x0 = (y(1) - y(-1)) / 2s with s = y(0) - min(y(-1), y(1)). Up to a pixel, as the
    place was chosen for another shape perhaps.
    """
    b, k = place.shape
    points = jnp.concatenate([place[..., None], jnp.asarray(_templates().cross)[place]], -1)
    at = jnp.take_along_axis(alike, points.reshape(b, 1, k * 5), axis=2)
    at = at.reshape(b, NUM_SHAPES, k, 5).transpose(0, 2, 1, 3)
    middle, low, high = at[..., :1], at[..., 1::2], at[..., 2::2]
    slope = jnp.maximum(middle - jnp.minimum(low, high), 1e-3)
    return jnp.clip((high - low) / (2 * slope), -1.0, 1.0)


def _match(found: Objects, colour: Array, shape: Array) -> tuple[Array, Array]:
    """Graded and strict match of every object with one clause (colour[b], shape[b]), both [b,5].

    graded = confidence · (0.6 P(colour) P(shape) + 0.2 P(colour) + 0.2 P(shape)); what is not said is 1.
    """
    p_colour = jnp.take_along_axis(found.colour, jnp.maximum(colour, 0)[:, None, None], 2)[..., 0]
    p_colour = jnp.where((colour < 0)[:, None], 1.0, p_colour)
    p_shape = jnp.take_along_axis(found.shape, jnp.maximum(shape, 0)[:, None, None], 2)[..., 0]
    graded = found.confidence * (0.6 * p_colour * p_shape + 0.2 * p_colour + 0.2 * p_shape)
    strict = found.confidence > STRICT_CONFIDENCE
    return graded, strict & (p_colour > STRICT_COLOUR) & (p_shape > STRICT_SHAPE)


def _relation(position: Float[Array, "b 5 2"], relation: Int[Array, " b"]) -> Float[Array, "b 5 5"]:
    """Pixels by which "object i is ... object j" holds; large where no relation is said."""
    x, y = jnp.moveaxis(position[:, None] - position[:, :, None], -1, 0)
    along = jnp.stack([x, -x, y, -y], 1)
    across = jnp.abs(jnp.stack([y, y, x, x], 1))
    margin = along - across / 2 - MARGIN
    said = jnp.take_along_axis(margin, jnp.maximum(relation, 0)[:, None, None, None], 1)[:, 0]
    return jnp.where((relation < 0)[:, None, None], 1e3, said)


def judge(images: Float[Array, "b 24 24 3"], spec: Int[Array, "b 7"], t: Array | None = None) -> Verdict:
    """Grade pictures against the prompts' spec rows; `t` (scalar or [b]) is the noise level of one-step
    decodes, which are smoothed and less held to account for what is unexplained.

        graded = quality^(1-t) · match / (1 + 0.5 · extra objects)
    """
    images = images.astype(jnp.float32)
    if t is not None:
        images = _smooth(images, t)
    found = detect(images)
    quality = jnp.exp(-found.unexplained / RESIDUAL_SCALE)
    count, relation = spec[:, 1], spec[:, 6]
    pair = spec[:, 5] >= 0
    first, first_strict = _match(found, spec[:, 2], spec[:, 3])
    second, second_strict = _match(found, spec[:, 4], spec[:, 5])

    wanted = jnp.where(pair, 2, count)
    ranked = -jnp.sort(-first, axis=1)
    one = jnp.where(jnp.arange(FOUND) < count[:, None], ranked, 0.0).sum(1) / count
    one_strict = first_strict.sum(1) == count

    different = ~np.eye(FOUND, dtype=bool)
    margin = _relation(found.position, relation)
    holds = RELATION_FLOOR + (1 - RELATION_FLOOR) * jax.nn.sigmoid(margin)
    both = 0.5 * (first[:, :, None] + second[:, None, :])
    two = jnp.where(different, both * holds, 0.0).max((1, 2))
    fits = first_strict[:, :, None] & second_strict[:, None, :] & (margin > 0) & different
    two_strict = fits.any((1, 2))

    match = jnp.where(pair, two, one)
    extra = jnp.maximum(found.confidence.sum(1) - wanted, 0.0)
    trust = quality if t is None else quality ** (1 - jnp.asarray(t, jnp.float32))
    graded = trust * match / (1 + EXTRA_COST * extra)
    exact = ((found.confidence > PRESENT).sum(1) == wanted) & (quality > STRICT_QUALITY)
    strict = (jnp.where(pair, two_strict, one_strict) & exact).astype(jnp.float32)
    return Verdict(graded, strict, {"match": match, "quality": quality, "extra": extra})
