"""Scores of finished images that come from outside the graph, while the device draws the next ones.

The graph's verdict and the host's are added up here, before credit is given; a score that did not come
makes the image's reward missing. Among several processes each scores the images that lie on its own
devices; the scores alone travel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import RewardError
from smart_grpo_jax.policy.rollout import Acted
from smart_grpo_jax.rewards.base import HostScores, Reward
from smart_grpo_jax.rewards.host import Ahead
from smart_grpo_jax.runtime import distributed

SHOWN = 3
"""Failed samples that a warning names."""


@jax.jit
def pixels(images: Float[Array, "b H W 3"]) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, " b"]]:
    """What every published reward sees, round(255 x) half to even, and which images are numbers at all."""
    known = jnp.nan_to_num(images.astype(jnp.float32), posinf=1.0, neginf=0.0)
    levels = jnp.clip(jnp.round(known * 255), 0, 255)
    return levels.astype(jnp.uint8), jnp.isfinite(images).all((1, 2, 3))


class Finished:
    """Images on their way to the host's rewards; costs nothing where a reward has none.

    `failed` tells after `gather` whose score did not come, as `name/p<prompt>/m<member>: reason`, `waited`
    for how many seconds the device had to wait for the host.
    """

    def __init__(
        self,
        reward: Reward,
        config: Config,
        name: str,
        members: int,
    ) -> None:
        self.failed: tuple[str, ...] = ()
        self.waited = 0.0
        self._ahead = Ahead(reward.host, config.host.ahead) if reward.host is not None else None
        self._name, self._members = name, members
        self._next: tuple[Array, Sequence[str], Sequence[int]] | None = None
        self._finite: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        self._ids: list[list[str]] = []

    def submit(self, images: Array, texts: Sequence[str], index: Sequence[int]) -> None:
        """The first images of a call, `members` of each prompt. To fetch them is to wait for the device, so
        that is left until the next call is on it."""
        self._begin()
        self._next = images, texts, index

    def _begin(self) -> None:
        if self._ahead is None or self._next is None:
            return
        images, texts, index = self._next
        prompts = [text for text in texts for _ in range(self._members)]
        ids = [f"{self._name}/p{i}/m{member}" for i in index for member in range(self._members)]
        eight_bit, finite = pixels(images)
        rows, own = distributed.own_rows(eight_bit)
        real = rows < len(ids)
        rows, own = rows[real], own[real]
        self._ids.append(ids)
        self._rows.append(rows)
        self._finite.append(distributed.whole(finite)[rows])
        started = time.monotonic()
        self._ahead.submit(own, [prompts[i] for i in rows], [ids[i] for i in rows])
        self.waited += time.monotonic() - started

    def gather(self) -> list[HostScores]:
        """All scores in the order of submission; an image that is no picture has none."""
        self._begin()
        if self._ahead is None:
            return []
        started = time.monotonic()
        gathered = self._ahead.gather()
        self.waited += time.monotonic() - started
        own = [_only(ok, scores) for ok, scores in zip(self._finite, gathered, strict=True)]
        scored = shared(own, self._rows, [len(ids) for ids in self._ids])
        self.failed = tuple(failures(scored, self._ids))
        return scored


def _only(finite: np.ndarray, scores: HostScores) -> HostScores:
    errors = tuple(
        e if ok else "the image is not finite" for ok, e in zip(finite, scores.errors, strict=True)
    )
    return HostScores(np.where(finite, scores.value, np.nan).astype(np.float32), errors, scores.parts)


def shared(own: Sequence[HostScores], rows: Sequence[np.ndarray], counts: Sequence[int]) -> list[HostScores]:
    """The scores of all images on every process, each of which brings those of its rows."""
    if jax.process_count() == 1:
        return list(own)
    brought = [
        [at.tolist(), one.value.tolist(), one.errors, {name: v.tolist() for name, v in one.parts.items()}]
        for one, at in zip(own, rows, strict=True)
    ]
    pieces = zip(*distributed.gather(brought), strict=True)
    return [_assembled(count, piece) for count, piece in zip(counts, pieces, strict=True)]


def _assembled(count: int, pieces: Sequence[Sequence[Any]]) -> HostScores:
    value, errors = np.full(count, np.nan, np.float32), [""] * count
    parts = {name: np.full(count, np.nan, np.float32) for name in pieces[0][3]}
    for rows, values, reasons, columns in pieces:
        value[rows] = values
        for row, why in zip(rows, reasons, strict=True):
            errors[row] = why
        for name, column in columns.items():
            parts[name][rows] = column
    return HostScores(value, tuple(errors), parts)


def added(acted: Acted, scores: HostScores) -> Acted:
    """The rollout with the host's share of its rewards; rows that fill the mesh stay without."""
    spare = acted.reward.shape[0] - len(scores.value)

    def full(values: np.ndarray) -> jax.Array:
        padded = np.pad(values.astype(np.float32), (0, spare), constant_values=np.nan)
        return distributed.place(padded, acted.reward.sharding)

    value = acted.reward + full(scores.value)
    parts = acted.parts | {name: full(values) for name, values in scores.parts.items()}
    return acted._replace(reward=value, ok=acted.ok & jnp.isfinite(value), parts=parts)


def failures(scored: Sequence[HostScores], ids: Sequence[Sequence[str]]) -> list[str]:
    """`id: reason` of every image with a score that did not come; first those whose reward it costs."""
    found = [
        (bool(np.isfinite(value)), f"{name}: {error}")
        for scores, names in zip(scored, ids, strict=True)
        for value, name, error in zip(scores.value, names, scores.errors, strict=True)
        if error
    ]
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def tolerated(config: Config, share: float, what: str, failed: Sequence[str]) -> str:
    """What to say of the images that lack a score; RewardError where too many lack their reward."""
    if share >= config.host.failed_share:
        first = f": {failed[0]}" if failed else ", or are NaN"
        raise RewardError(f"rewards: {share:.0%} of {what} failed{first}")
    if not failed:
        return ""
    more = ", …" if len(failed) > SHOWN else ""
    names = ", ".join(line.partition(":")[0] for line in failed[1:SHOWN])
    return f"WARNING: {len(failed)} images of {what} lack a score: {failed[0]}" + (
        f" (also {names}{more})" if names else ""
    )
