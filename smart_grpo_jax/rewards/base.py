"""What a reward is, the table of the rewards that come with the package, and how a user calls one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree, ScoreFn, Scores


class HostScores(NamedTuple):
    """The verdict of plain Python: `value` is NaN where it is missing, `errors` says why ("" elsewhere)."""

    value: Float[np.ndarray, " b"]
    errors: tuple[str, ...]
    parts: dict[str, Float[np.ndarray, " b"]]


HostScore: TypeAlias = Callable[[UInt8[np.ndarray, "b H W 3"], Sequence[str], Sequence[str]], HostScores]
"""host(images, prompts, ids) -> HostScores: ends in a known time; a score that failed is missing."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward, ready to be used in a graph: `score(params, images, prepare(prompts), t)`.

    `prepare` turns prompts into arrays with one row per prompt, once, on the host; a reward that does
    not look at the prompt returns an empty tree. `host` is the part that is plain Python and judges
    finished images only: the value of an image is what the graph says plus what `host` says.
    """

    name: str
    params: PyTree
    prepare: Callable[[Sequence[str]], PyTree]
    score: ScoreFn
    uses_prompt: bool
    host: HostScore | None = None


Builder: TypeAlias = Callable[..., Reward]
"""builder(path, dtype, **options) -> Reward"""

REWARDS: dict[str, str] = {
    "shapes": "smart_grpo_jax.rewards.shapes:build",
    "shapes_aesthetic": "smart_grpo_jax.rewards.shapes_aesthetic:build",
    "shapes_image_reward": "smart_grpo_jax.rewards.shapes_learned:build_image_reward",
    "shapes_aesthetic_clip": "smart_grpo_jax.rewards.shapes_learned:build_aesthetic_clip",
    "image_reward": "smart_grpo_jax.rewards.image_reward:build",
    "aesthetic": "smart_grpo_jax.rewards.clip_family:build_aesthetic",
    "pick_score": "smart_grpo_jax.rewards.clip_family:build_pick_score",
    "clip_score": "smart_grpo_jax.rewards.clip_family:build_clip_score",
    "hps": "smart_grpo_jax.rewards.clip_family:build_hps",
    "compressibility": "smart_grpo_jax.rewards.compressibility:build",
    "incompressibility": "smart_grpo_jax.rewards.compressibility:build_negated",
    "jpeg_compressibility": "smart_grpo_jax.rewards.jpeg:build",
    "jpeg_incompressibility": "smart_grpo_jax.rewards.jpeg:build_negated",
    "remote": "smart_grpo_jax.rewards.remote:build",
    "geneval": "smart_grpo_jax.rewards.geneval:build",
    "ocr": "smart_grpo_jax.rewards.ocr:build",
    "judge": "smart_grpo_jax.rewards.judge:build",
}
"""Name -> where its builder is. Text, so that a reward's imports are paid by those who use it."""

HOST = frozenset({"jpeg_compressibility", "jpeg_incompressibility", "remote", "geneval", "ocr", "judge"})
"""The rows that are plain Python or a server, and judge finished images alone."""

FUNCTIONS = "smart_grpo_jax.rewards.user:builder"
"""What makes a builder of `module:function`, a user's own reward."""


def known(name: str, field: str = "reward") -> str:
    """The name itself; UserError where it is no row of the table and no `module:function`."""
    if name not in REWARDS and ":" not in name:
        raise UserError(f'{field}: got "{name}", want the name of a reward ({nearest(name, REWARDS)})')
    return name


def builder(name: str) -> Builder:
    """The function that builds the named reward."""
    if name in REWARDS or ":" not in name:
        return _function(REWARDS[known(name)])
    return _function(FUNCTIONS)(name)


def _function(where: str) -> Any:
    module, function = where.split(":")
    return getattr(importlib.import_module(module), function)


def is_host(name: str) -> bool:
    """Whether the named reward is plain Python, and so cannot be asked inside a graph."""
    return name in HOST or (name not in REWARDS and hasattr(builder(name), "limits"))


def build(
    name: str,
    path: str | None = None,
    dtype: str = "float32",
    kind: str | None = None,
    limits: Host | None = None,
    **options: Any,
) -> Reward:
    """Build a reward by name; `path` is where its weights are, `options` are its own.

    `kind` is the row of the table, or `module:function`, where it is not the name itself. A host reward
    takes fields of `limits` (time-outs, workers) as options of its own, too.
    """
    make = builder(kind or name)
    allowed = set(inspect.signature(make).parameters) - {"path", "dtype", "limits"}
    if is_host(kind or name):
        own = dict(getattr(make, "limits", {}))
        own |= {key: options.pop(key) for key in list(options) if key in LIMITS and key not in allowed}
        options["limits"] = tightened(name, limits or Host(), own)
    for option in options:
        if option not in allowed | {"limits"}:
            wanted = allowed | (LIMITS if "limits" in options else set())
            hint = nearest(option, wanted) if wanted else "it has none"
            raise UserError(f'reward {name}: got option "{option}", want one of its own ({hint})')
    return make(path=path, dtype=dtype, **options)


LIMITS = {field.name for field in dataclasses.fields(Host)} - {"ahead", "failed_share"}


def tightened(name: str, limits: Host, own: dict[str, Any]) -> Host:
    """The run's limits with those that a reward sets for itself; numbers of the command line are floats."""
    whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in own.items()}
    return schema.build(Host, dataclasses.asdict(limits) | whole, f"reward {name}: ")


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
    score = jax.jit(reward.score)

    def call(images: Float[Array, "b H W 3"], prompts: Sequence[str]) -> Float[np.ndarray, " b"]:
        shape = np.shape(images)
        if len(shape) != 4 or shape[-1] != 3:
            raise UserError(f"reward {name}: got images of shape {shape}, want [b, H, W, 3]")
        if isinstance(prompts, str) or len(prompts) != shape[0]:
            count = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise UserError(f"reward {name}: got {count} for {shape[0]} images, want a prompt per image")
        ctx = reward.prepare(prompts)
        if reward.host is not None:
            ids = [str(i) for i in range(shape[0])]
            return reward.host(eight_bit(np.asarray(images)), prompts, ids).value.astype(np.float32)
        scores = score(reward.params, images, ctx, None)
        return np.where(np.asarray(scores.ok), np.asarray(scores.value, np.float32), np.float32(np.nan))

    return call


def eight_bit(images: Float[np.ndarray, "b H W 3"]) -> UInt8[np.ndarray, "b H W 3"]:
    """What every published reward sees: round(255 x), half to even, clamped; NaN is black."""
    known = np.nan_to_num(np.asarray(images, np.float32), posinf=1.0, neginf=0.0)
    return np.clip(np.rint(known * 255), 0, 255).astype(np.uint8)
