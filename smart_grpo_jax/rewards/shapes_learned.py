"""The embedded world's learned rewards: the code paths of ImageReward and of the aesthetic predictor, on
small weights that come with the package (jobs/pretrain_rewards.py makes them).

They are proxies: where a policy pleases them and not the exact judge, it has found their mistakes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from smart_grpo_jax.rewards import clip_family, image_reward
from smart_grpo_jax.rewards.base import Reward
from smart_grpo_jax.worlds import shapes

FOLDER = Path(shapes.__file__).parent / "rewards"


def build_image_reward(
    path: str | None = None, dtype: str = "float32", fast: bool = False, folded: bool = True
) -> Reward:
    """ImageReward's network at 1/800 of its size; mean 0 and std 1 over held-out pictures."""
    made = image_reward.build(path or str(FOLDER / "image_reward"), dtype, fast=fast, folded=folded)
    return dataclasses.replace(made, name="shapes_image_reward")


def build_aesthetic_clip(
    path: str | None = None, dtype: str = "float32", fast: bool = False, folded: bool = True
) -> Reward:
    """The closed form of `shapes_aesthetic` as a CLIP and five linear layers have learned it."""
    made = clip_family.build_aesthetic(path or str(FOLDER / "aesthetic"), dtype, fast=fast, folded=folded)
    return dataclasses.replace(made, name="shapes_aesthetic_clip")
