"""scheduler_config.json: the time grid that a published pipeline samples with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.maths import schedule
from smart_grpo_jax.models import published

CLASS = "FlowMatchEulerDiscreteScheduler"


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """The fields that decide the times, with diffusers' defaults."""

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheduler:
        """Read a scheduler's config; a way to place the times that is not built is a UserError."""
        name = data.get("_class_name", CLASS)
        if name != CLASS:
            raise UserError(f"scheduler: got {name!r}, wanted {CLASS!r}")
        fixed = {"num_train_timesteps": (schedule.TRAIN_STEPS,), "time_shift_type": ("exponential",)}
        values = {k: v for k, v in data.items() if v is not None}
        return published.read(cls, values, fixed=fixed, ignored=("set_alpha_to_one",))

    def factor(self, image_tokens: int) -> float:
        """s of s·u / (1 + (s - 1)·u): the shift, or e^mu with mu linear in the number of image tokens."""
        if not self.use_dynamic_shifting:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return math.exp(self.base_shift + slope * (image_tokens - self.base_image_seq_len))

    def times(self, num_steps: int, image_tokens: int, given: bool, shift: float = 0.0) -> np.ndarray:
        """The grid 1 … 0, one value more than steps; `shift` replaces the scheduler's own.

        A pipeline that hands its sigmas over (`given`: FLUX) has linspace(1, 1/n, n), shifted once. Where
        the scheduler makes them, a fixed shift is applied twice and a dynamic one once.
        """
        factor = shift or self.factor(image_tokens)
        if given:
            return schedule.linspace(num_steps, factor)
        if shift or not self.use_dynamic_shifting:
            return schedule.sd3(num_steps, factor)
        raw = np.linspace(1.0, 1 / schedule.TRAIN_STEPS, num_steps)
        return np.append(schedule.shift(raw, factor), 0.0).astype(np.float32)
