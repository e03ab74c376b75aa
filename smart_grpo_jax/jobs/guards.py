"""The promises that training checks after every update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import NumericsError
from smart_grpo_jax.core.types import TrainState

RATIO_TOLERANCE = 1e-6
"""How far the first update's ratio may be from 1: rollout and update share one step function."""

BAD_UPDATES = 3
"""Non-finite gradients in a row that end a run."""


def check(config: Config, state: TrainState, metrics: Mapping[str, Any], first: bool) -> None:
    """NumericsError where rollout and update disagree before the `first` update, or where nothing is learned
    any more."""
    error = float(metrics.get("first_ratio_error", 0.0))
    if first and config.model.dtype == "float32" and error > RATIO_TOLERANCE:
        raise NumericsError(
            f"ratio: got 1 ± {error:.1e} before the first update, wanted 1 ± {RATIO_TOLERANCE:g} "
            "(rollout and update disagree)"
        )
    if int(state.counters["skipped_in_a_row"]) >= BAD_UPDATES:
        raise NumericsError(
            f"train: {BAD_UPDATES} updates in a row had a non-finite gradient at epoch {int(state.epoch)}; "
            "the last checkpoint is good: lower train.learning_rate"
        )
