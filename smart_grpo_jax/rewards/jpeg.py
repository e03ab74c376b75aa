"""The size of an image as a JPEG file, written by Pillow: Flow-GRPO's rewards to the byte.

compressibility.py estimates the same in the graph, where the search can ask for it.
"""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards import host
from smart_grpo_jax.rewards.base import Reward, no_prompt, nothing, without_weights
from smart_grpo_jax.rewards.compressibility import KILOBYTES_PER_POINT


def kilobytes(image: UInt8[np.ndarray, "H W 3"], quality: int = 95) -> float:
    """Size of the file in units of 1,000 bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


def _reward(name: str, factor: float, path: str | None, limits: Host | None, quality: int) -> Reward:
    without_weights(name, path)
    if not 1 <= quality <= 100:
        raise UserError(f"reward {name}: got quality {quality}, want 1 to 100 (try 95)")

    def ask(batch: host.Batch) -> list[host.Answer]:
        sizes = [kilobytes(image, int(quality)) for image in batch.images]
        return [host.Answer(factor * size, parts={"kilobytes": size}) for size in sizes]

    scorer = host.scorer(ask, limits or Host(), ("kilobytes",))
    return Reward(name, {}, no_prompt, nothing().score, uses_prompt=False, host=scorer)


def build(
    path: str | None = None, dtype: str = "float32", limits: Host | None = None, quality: int = 95
) -> Reward:
    """Minus kilobytes / 500: simple pictures win."""
    return _reward("jpeg_compressibility", -1.0 / KILOBYTES_PER_POINT, path, limits, quality)


def build_negated(
    path: str | None = None, dtype: str = "float32", limits: Host | None = None, quality: int = 95
) -> Reward:
    """Plus kilobytes, as Flow-GRPO counts them here: busy pictures win."""
    return _reward("jpeg_incompressibility", 1.0, path, limits, quality)
