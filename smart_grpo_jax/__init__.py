"""Reinforcement learning of flow-matching image models with searched noise, in JAX.

    pipe = load_pipeline("shapes")
    images = pipe.sample(["a red circle above a blue square"])

Names are imported when they are used, so that `import smart_grpo_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smart_grpo_jax.core.errors import nearest

if TYPE_CHECKING:
    from smart_grpo_jax.core.types import Conditioning
    from smart_grpo_jax.hub.pipeline import load_pipeline
    from smart_grpo_jax.rewards.base import load_reward
    from smart_grpo_jax.rewards.server import RewardServer
    from smart_grpo_jax.rewards.user import host_reward, reward

HOMES = {
    "load_pipeline": "smart_grpo_jax.hub.pipeline",
    "load_reward": "smart_grpo_jax.rewards.base",
    "Conditioning": "smart_grpo_jax.core.types",
    "RewardServer": "smart_grpo_jax.rewards.server",
    "host_reward": "smart_grpo_jax.rewards.user",
    "reward": "smart_grpo_jax.rewards.user",
}

__all__ = ["Conditioning", "RewardServer", "host_reward", "load_pipeline", "load_reward", "reward"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"smart_grpo_jax has no {name!r} ({nearest(name, HOMES)})")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOMES])
