"""The promises that training checks after every update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import NumericsError
from smart_grpo_jax.core.types import TrainState
from smart_grpo_jax.maths import transition

RATIO_TOLERANCE = 1e-6
"""How far the first update's ratio may be from 1: rollout and update share one step function."""

ROUNDING = 5e-7
"""What a velocity may differ in between two programs: a few roundings of numbers near one in float32. A step
whose noise is small beside what the velocity moves it by (CPS before its end) tells it from afar."""

BAD_UPDATES = 3
"""Non-finite gradients in a row that end a run."""


def tolerance(config: Config, times: np.ndarray, trained: np.ndarray) -> float:
    """How far from 1 the ratio of the trained steps may be before the first update."""
    sampler = config.sampler
    felt = transition.leverage(sampler.transition, jnp.asarray(times), sampler.noise_level)
    return max(RATIO_TOLERANCE, ROUNDING * float(np.asarray(felt)[trained].max(initial=0)))


def check(
    config: Config, state: TrainState, metrics: Mapping[str, Any], allowed: float | None = None
) -> None:
    """NumericsError where rollout and update disagree by more than is `allowed` (before the first update), or
    where nothing is learned any more."""
    error = float(metrics.get("first_ratio_error", 0.0))
    if allowed is not None and config.model.dtype == "float32" and error > allowed:
        raise NumericsError(
            f"ratio: got 1 ± {error:.1e} before the first update, wanted 1 ± {allowed:.1g} "
            "(rollout and update disagree)"
        )
    if int(state.counters["skipped_in_a_row"]) >= BAD_UPDATES:
        raise NumericsError(
            f"train: {BAD_UPDATES} updates in a row had a non-finite gradient at epoch {int(state.epoch)}; "
            "the last checkpoint is good: lower train.learning_rate"
        )
