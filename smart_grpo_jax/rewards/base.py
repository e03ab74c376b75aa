"""What a reward is, the table of the rewards that come with the package, and how a user calls one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree, ScoreFn, Scores


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward, ready to be used in a graph: `score(params, images, prepare(prompts), t)`.

    `prepare` turns prompts into arrays with one row per prompt, once, on the host; a reward that does
    not look at the prompt returns an empty tree. `host` rewards are plain Python and judge finished
    images only.
    """

    name: str
    params: PyTree
    prepare: Callable[[Sequence[str]], PyTree]
    score: ScoreFn
    uses_prompt: bool
    host: bool = False


Builder: TypeAlias = Callable[..., Reward]
"""builder(path, dtype, **options) -> Reward"""

REWARDS: dict[str, str] = {
    "shapes": "smart_grpo_jax.rewards.shapes:build",
    "shapes_aesthetic": "smart_grpo_jax.rewards.shapes_aesthetic:build",
    "compressibility": "smart_grpo_jax.rewards.compressibility:build",
    "incompressibility": "smart_grpo_jax.rewards.compressibility:build_negated",
}
"""Name -> where its builder is. Text, so that a reward's imports are paid by those who use it."""


def known(name: str, field: str = "reward") -> str:
    """The name itself; UserError where the table has no such row."""
    if name not in REWARDS:
        raise UserError(f'{field}: got "{name}", want the name of a reward ({nearest(name, REWARDS)})')
    return name


def builder(name: str) -> Builder:
    """The function that builds the named reward."""
    module, function = REWARDS[known(name)].split(":")
    return getattr(importlib.import_module(module), function)


def build(name: str, path: str | None = None, dtype: str = "float32", **options: Any) -> Reward:
    """Build a reward by name; `path` is where its weights are, `options` are its own."""
    make = builder(name)
    allowed = set(inspect.signature(make).parameters) - {"path", "dtype"}
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed) if allowed else "it has none"
            raise UserError(f'reward {name}: got option "{option}", want one of its own ({hint})')
    return make(path=path, dtype=dtype, **options)


def without_weights(name: str, path: str | None) -> None:
    """UserError where a path is given to a reward that has no weights."""
    if path is not None:
        raise UserError(f'reward {name}: got path "{path}", want none: it has no weights')


def no_prompt(prompts: Sequence[str]) -> PyTree:
    """`prepare` of a reward that does not look at the prompt."""
    return {}


def nothing() -> Reward:
    """No verdict: zero for every image, where there is nothing to judge by."""

    def score(params: PyTree, images: Array, ctx: PyTree, t: Array | None = None) -> Scores:
        return Scores(jnp.zeros(images.shape[0]), jnp.ones(images.shape[0], bool), {})

    return Reward("nothing", {}, no_prompt, score, uses_prompt=False)


def load_reward(
    name: str, path: str | None = None, dtype: str = "float32", **options: Any
) -> Callable[[Float[Array, "b H W 3"], Sequence[str]], Float[np.ndarray, " b"]]:
    """The named reward as a function of images [b,H,W,3] in [0,1] and b prompts; NaN where it failed."""
    reward = build(name, path, dtype, **options)
    score = reward.score if reward.host else jax.jit(reward.score)

    def call(images: Float[Array, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
        shape = np.shape(images)
        if len(shape) != 4 or shape[-1] != 3:
            raise UserError(f"reward {name}: got images of shape {shape}, want [b, H, W, 3]")
        if isinstance(prompts, str) or len(prompts) != shape[0]:
            count = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UserError(f"reward {name}: got {count} for {shape[0]} images, want a prompt per image")
        scores = score(reward.params, images, reward.prepare(prompts), None)
        return np.where(np.asarray(scores.ok), np.asarray(scores.value, np.float32), np.float32(np.nan))

    return call
