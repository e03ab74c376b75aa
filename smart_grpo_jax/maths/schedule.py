"""Times of the sampler: sigma from 1 (noise) to 0 (data), one value more than there are steps.

Two constructions of the SD3 grid are in use and published numbers differ by them; both are here.
docs/algorithm.md, section 1.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from smart_grpo_jax.maths.choice import choose

Times = Float[np.ndarray, " steps_plus_1"]

TRAIN_STEPS = 1000


def shift(u, s: float):
    """Timestep shift for large images: s u / (1 + (s - 1) u); fixes 0 and 1."""
    return s * u / (1 + (s - 1) * u)


def sd3(num_steps: int, shift: float = 3.0) -> Times:
    """The grid that diffusers' scheduler builds from a step count alone.

    The raw times run from 1 to sigma_min = shift(1/1000), which is shifted already, and are shifted
    again; so the last hop is 0.0089 -> 0 for every step count at shift 3.
    """
    _check(num_steps, shift)
    last = _shifted(1 / TRAIN_STEPS, shift)
    return _closed(_shifted(np.linspace(1.0, last, num_steps), shift))


def linspace(num_steps: int, shift: float = 3.0) -> Times:
    """shift(linspace(1, 0, N + 1)): DanceGRPO, MixGRPO, and pipelines given explicit sigmas."""
    _check(num_steps, shift)
    return _closed(_shifted(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift))


def flux_mu(image_tokens: int) -> float:
    """FLUX's log-shift, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096."""
    return 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def flux(num_steps: int, image_tokens: int) -> Times:
    """FLUX's dynamic shift: e^mu / (e^mu + 1/u - 1) = shift(u, e^mu) of linspace(1, 1/N, N), then 0."""
    if image_tokens is None or image_tokens < 1:
        raise ValueError(f"schedule flux: got image_tokens={image_tokens}, want the number of image tokens")
    return linspace(num_steps, math.exp(flux_mu(image_tokens)))


SCHEDULES = {"sd3": sd3, "linspace": linspace, "flux": flux}


def times(kind: str, num_steps: int, shift: float = 3.0, image_tokens: int | None = None) -> Times:
    """The grid called `kind`; "flux" reads `image_tokens`, the others `shift`."""
    build = choose(SCHEDULES, kind, "schedule")
    return build(num_steps, image_tokens if kind == "flux" else shift)


_shifted = shift


def _closed(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0).astype(np.float32)


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise ValueError(f"schedule: got num_steps={num_steps}, want at least 1")
    if not shift > 0:
        raise ValueError(f"schedule: got shift={shift}, want a positive number")
