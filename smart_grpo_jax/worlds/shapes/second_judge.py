"""A second opinion on the shapes world, for evaluation only: numpy, float64, hard decisions.

It shares neither templates nor soft scores with the first judge: pixels get the nearest hue, connected
pixels of one hue are an object, and an object's shape is read from its moments. A policy that has
learned to please the first judge instead of drawing better shows as a gap between the two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from smart_grpo_jax.worlds.shapes.render import GROUND, PALETTE

COVERED, SPLIT = 0.62, 0.8
"""Share of a pixel that must be covered to belong to an object. Objects 0.6 pixels apart may still touch
at 0.62: a piece larger than any one object is looked at again at 0.8, where they cannot."""
SAME_HUE = 0.96
"""Cosine with the palette's hue; an orange has at most 0.95 with red and with yellow."""
EDGE = 0.05
OTHER = len(PALETTE)
SPECK, SMALLEST, LARGEST = 4.0, 10.0, 46.0
"""Areas in pixels: below a speck nothing is counted; outside smallest ... largest it is no shape (clean
objects have 17 ... 44)."""

PROTOTYPES = np.array([[0.167, 0.0, 0.0], [0.173, -0.434, 0.0], [0.207, -0.01, 0.646], [0.203, 0.431, 0.0]])
"""Mean of (m2, h4, h3) of `features` over 1,024 rendered scenes, in the order of `grammar.SHAPES`."""
SPREAD = np.array([0.02, 0.06, 0.08])
FARTHEST = 3.0
"""Moments count in units of the spread, about twice the scatter of clean objects (the two nearest
prototypes, circle and square, are 7 apart); beyond the farthest it is none of the four."""


class Components(NamedTuple):
    """All connected pieces of a batch of pictures, as flat arrays; shape -1 and colour 6 are unknown."""

    image: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    x: np.ndarray
    y: np.ndarray


def _hues(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest hue [b,h,w], covered share of the pixel, and which pixels belong to an object for sure."""
    offset = images.astype(np.float64) - GROUND
    axes = PALETTE.astype(np.float64) * 0.95 - GROUND
    lengths = np.linalg.norm(axes, axis=-1)
    along = offset @ (axes / lengths[:, None]).T
    hue = along.argmax(-1)
    best = along.max(-1)
    share = np.clip(best / lengths[hue], 0.0, 1.0)
    length = np.linalg.norm(offset, axis=-1)
    solid = np.where(best > SAME_HUE * length, share, length / lengths.min()) > COVERED
    hue = np.where(solid & (best <= SAME_HUE * length), OTHER, hue)
    return hue, share, solid


def _shifts(array: np.ndarray, fill: int, corners: bool = False) -> list[np.ndarray]:
    """The array moved by one pixel in four (or eight) directions."""
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)]
    steps += [(1, 1), (1, -1), (-1, 1), (-1, -1)] if corners else []
    height, width = array.shape[1:]
    padded = np.pad(array, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    return [padded[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in steps]


def _label(hue: np.ndarray, solid: np.ndarray) -> np.ndarray:
    """Connected components (4 neighbours, equal hue): every pixel takes the smallest label it touches
    until nothing changes. -1 where there is no object."""
    far = solid.size
    label = np.where(solid, np.arange(far).reshape(solid.shape), far)
    same = [(other == hue) & solid for other in _shifts(np.where(solid, hue, -1), -1)]
    while True:
        lower = label
        for alike, other in zip(same, _shifts(label, far), strict=True):
            lower = np.where(alike, np.minimum(lower, other), lower)
        if np.array_equal(lower, label):
            return np.where(solid, label, -1)
        label = lower


def _with_edges(label: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Half-covered pixels join the object they touch, so that areas and moments count them."""
    free = (label < 0) & (share > EDGE)
    touching = np.max(_shifts(label, -1, corners=True), axis=0)
    return np.where(free, touching, label)


def features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per component: picture, hue, centre and area [n,3], and three moments [n,3] that know neither place
    nor size: second moment over area, and the four-fold and three-fold harmonics

        m2 = <r²> / area     h4 = <r⁴ cos 4φ> / <r⁴>     h3 = <r³ sin 3φ> / <r³>
    """
    hue, share, solid = _hues(images)
    label = _label(hue, solid)
    size = np.bincount(label.ravel() + 1, share.ravel(), label.size + 1)
    large = (label >= 0) & (size[label + 1] > SPLIT * LARGEST)
    label = _with_edges(_label(hue, solid & (~large | (share > SPLIT))), share)
    _, height, width = label.shape
    member = label >= 0
    names, index = np.unique(label[member], return_inverse=True)
    weight = np.maximum(share[member], 1e-6)
    yy, xx = np.broadcast_arrays(np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5)
    x, y = (np.broadcast_to(a, label.shape)[member] for a in (xx, yy))

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, weight * values, len(names))

    area = total(np.ones_like(x))
    centre_x, centre_y = total(x) / area, total(y) / area
    z = (x - centre_x[index]) + 1j * (y - centre_y[index])
    r = np.abs(z)
    moments = np.stack(
        [
            total(r**2) / area**2,
            total((z**4).real) / np.maximum(total(r**4), 1e-9),
            total((z**3).imag) / np.maximum(total(r**3), 1e-9),
        ],
        axis=-1,
    )
    picture = names // (height * width)
    colour = hue.reshape(-1)[names]
    return picture, colour, np.stack([centre_x, centre_y, area], -1), moments


def components(images: np.ndarray) -> Components:
    """Find the objects of every picture [b,24,24,3]."""
    picture, colour, place, moments = features(images)
    x, y, area = place.T
    distance = np.linalg.norm((moments[:, None] - PROTOTYPES) / SPREAD, axis=-1)
    known = (distance.min(-1) < FARTHEST) & (area > SMALLEST) & (area < LARGEST)
    shape = np.where(known, distance.argmin(-1), -1)
    keep = area > SPECK
    return Components(picture[keep], colour[keep], shape[keep], x[keep], y[keep])


def _holds(dx: float, dy: float, relation: int) -> bool:
    """Whether the second object lies at (dx, dy) from the first as the relation says, within 60 degrees."""
    along, across = ((dx, dy), (-dx, dy), (dy, dx), (-dy, dx))[relation]
    return along > 2.0 and along > 0.57 * abs(across)


def _grade(row: np.ndarray, colour: np.ndarray, shape: np.ndarray, x: np.ndarray, y: np.ndarray):
    """One picture's graded and strict value: the mean share of said attributes that are right."""
    _, count, colour1, shape1, colour2, shape2, relation = (int(value) for value in row)

    def match(wanted_colour: int, wanted_shape: int) -> np.ndarray:
        right = (shape == wanted_shape).astype(float)
        return right if wanted_colour < 0 else (right + (colour == wanted_colour)) / 2

    wanted = count if shape2 < 0 else 2
    first = match(colour1, shape1)
    if shape2 < 0:
        best = np.sort(first)[::-1][:count].sum() / count
    else:
        second, best = match(colour2, shape2), 0.0
        for i in range(len(first)):
            for j in range(len(first)):
                fits = relation < 0 or _holds(x[j] - x[i], y[j] - y[i], relation)
                score = (first[i] + second[j]) / 2 * (1.0 if fits else 0.6)
                best = max(best, score if i != j else first[i] / 2)
    strict = float(best == 1.0 and len(first) == wanted)
    return best / (1 + 0.5 * max(len(first) - wanted, 0)), strict


def second_judge(images: np.ndarray, spec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Graded and strict values, float32[b] each, of pictures [b,24,24,3] for spec rows [b,7]."""
    images, spec = np.asarray(images), np.asarray(spec)
    found = components(np.nan_to_num(images))
    graded, strict = np.zeros((2, len(images)), np.float32)
    for i, row in enumerate(spec):
        mine = found.image == i
        graded[i], strict[i] = _grade(
            row, found.colour[mine], found.shape[mine], found.x[mine], found.y[mine]
        )
    return graded, strict
