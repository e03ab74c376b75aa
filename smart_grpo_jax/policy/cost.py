"""What an epoch costs: every network, decoder and reward call is counted, so that any two runs can be
compared at equal cost. A guided velocity is two network calls; padding is not counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.contradictions import LIKELIHOOD
from smart_grpo_jax.policy.credit import Masks
from smart_grpo_jax.policy.losses import Recipe
from smart_grpo_jax.policy.rollout import Shape

NOTHING = {"velocity": 0, "backward": 0, "decode": 0, "reward": 0, "images": 0}


Calls = Callable[[float], int]
"""Network calls of one velocity at a guidance scale: the model's own (`Pipeline.calls`)."""


def calls(guidance: float) -> int:
    """Classifier-free guidance: a second call above 1."""
    return 1 if guidance <= 1 else 2


def on_path(shape: Shape) -> int:
    """Velocities of one image: its steps, and what forecasts before its end need beside them."""
    early = shape.stop < shape.steps or shape.one_step_rewards
    forecasts = shape.stop * shape.one_step_rewards + early
    return shape.stop + early + forecasts * (shape.lookahead - 1)


def candidates(config: Config, images: int, searched: int) -> int:
    """Candidates that are tried for so many images at so many steps."""
    return images * searched * config.search.rounds * config.search.candidates


def images_seen(shape: Shape, recipe: Recipe, config: Config, masks: Masks) -> dict[str, int]:
    """Images that pass through each part of an epoch: `path` through the executed steps, `forecast` and
    `search` as candidates through the network and the judges, `judged` through decoder and reward outside the
    search (`unfinished` of them before their last step, which a reward may be told), `learned` through a
    gradient."""
    groups, searched = int(np.sum(np.asarray(masks.real))), int(np.sum(np.asarray(masks.searched)))
    images, few = groups * shape.members, groups * shape.searched_members
    states = len(masks.trained) if recipe.loss in LIKELIHOOD else 1
    tried = candidates(config, few, searched)
    return {
        "path": images * on_path(shape),
        "forecast": tried * shape.lookahead,
        "search": tried,
        "judged": images * (1 + shape.stop * shape.one_step_rewards),
        "unfinished": images * (shape.stop * shape.one_step_rewards + (shape.stop < shape.steps)),
        "learned": images * states * recipe.passes,
    }


def sampling(
    shape: Shape, config: Config, groups: int, searched: int, calls: Calls = calls
) -> dict[str, int]:
    """One rollout of `groups` real groups in which `searched` steps are searched."""
    guided = calls(config.sampler.guidance)
    inside = calls(config.search.guidance) if config.search.guidance >= 0 else guided
    images = groups * shape.members
    tried = candidates(config, groups * shape.searched_members, searched)
    judged = images * (1 + shape.stop * shape.one_step_rewards)
    return {
        "velocity": images * on_path(shape) * guided + tried * shape.lookahead * inside,
        "backward": 0,
        "decode": judged + tried,
        "reward": judged + tried,
        "images": images,
    }


def learning(
    recipe: Recipe, config: Config, groups: int, trained: int, calls: Calls = calls
) -> dict[str, int]:
    """All passes over one epoch: forward calls (with the reference's or the old policy's) and backward."""
    images = groups * config.prompts.members
    if recipe.loss in LIKELIHOOD:
        states = images * trained * calls(config.sampler.guidance) * recipe.passes
        forwards = 1 + recipe.use_kl
    else:
        states, forwards = images * recipe.passes, 2 + recipe.use_kl
    return {"velocity": states * forwards, "backward": states, "decode": 0, "reward": 0, "images": 0}


def epoch(shape: Shape, recipe: Recipe, config: Config, masks: Masks, calls: Calls = calls) -> dict[str, int]:
    """One epoch of training."""
    groups = int(np.sum(np.asarray(masks.real)))
    searched = int(np.sum(np.asarray(masks.searched)))
    act = sampling(shape, config, groups, searched, calls)
    return add(act, learning(recipe, config, groups, len(masks.trained), calls))


def add(total: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Sums by name."""
    return {name: total.get(name, 0) + more.get(name, 0) for name in NOTHING}
