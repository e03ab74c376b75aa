"""Rewards in plain Python: batches of finished images in threads, each with an end, none with an excuse.

A score that did not come (an exception, a time-out, no number) is missing: NaN with the reason beside it,
never 0. Nothing here calls jax, so that the device goes on with the next rollout meanwhile.
"""

from __future__ import annotations

import math
import numbers
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.types import metadata_of
from smart_grpo_jax.rewards.base import HostScore, HostScores

T = TypeVar("T")
Images = UInt8[np.ndarray, "b H W 3"]


class Answer(NamedTuple):
    """What came back for one image: a score, or why there is none; `text` is what an OCR server read."""

    score: Any
    error: str = ""
    parts: Mapping[str, Any] = {}
    text: str | None = None


class Batch(NamedTuple):
    """What one call is about."""

    images: Images
    prompts: list[str]
    metadata: list[dict[str, Any]]
    ids: list[str]


Ask = Callable[[Batch], Sequence[Answer]]
"""ask(batch) -> an answer per image; may raise, must end."""


def number(value: Any) -> tuple[float, str]:
    """A score as a float, or NaN and the reason: text, truth values and infinities are no scores."""
    if value is None:
        return math.nan, "no score"
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        return math.nan, f"got score {value!r:.40}, want a number"
    found = float(value)
    return (found, "") if math.isfinite(found) else (math.nan, f"got score {found}")


def reason(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return text if type(error).__name__ == "Failure" else f"{type(error).__name__}: {text}"


def scorer(ask: Ask, limits: Host, parts: Sequence[str] = ()) -> HostScore:
    """`ask` over any number of images: `limits.batch` in a call, `limits.workers` calls at once.

    The queue is bounded by its workers: each takes the next batch when it is free. `parts` are the names
    that answers may bring beside their score; what they leave out is NaN.
    """
    slots = threading.BoundedSemaphore(limits.workers)

    def score(images: Images, prompts: Sequence[str], ids: Sequence[str]) -> HostScores:
        starts = range(0, len(prompts), limits.batch)
        found: dict[int, list[Answer]] = {}
        waiting = iter(starts)
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    start = next(waiting, None)
                if start is None:
                    return
                here = slice(start, start + limits.batch)
                texts = list(prompts[here])
                with slots:
                    batch = Batch(images[here], texts, [dict(metadata_of(t)) for t in texts], list(ids[here]))
                    found[start] = answered(ask, batch)

        together([work] * min(limits.workers, len(starts)))
        return collected([answer for start in starts for answer in found[start]], parts)

    return score


def answered(ask: Ask, batch: Batch) -> list[Answer]:
    """One answer per image, whatever happens."""
    count = len(batch.prompts)
    try:
        answers = list(ask(batch))
    except Exception as error:  # whatever a user's code or a server does, it costs these scores alone
        return [Answer(None, reason(error))] * count
    if len(answers) != count:
        return [Answer(None, f"got {len(answers)} scores for {count} images")] * count
    return answers


def collected(answers: Sequence[Answer], parts: Sequence[str]) -> HostScores:
    """Answers as arrays."""
    values, errors = [], []
    for answer in answers:
        value, error = (math.nan, answer.error) if answer.error else number(answer.score)
        values.append(value)
        errors.append(error)
    rows = {name: np.asarray([number(a.parts.get(name))[0] for a in answers], np.float32) for name in parts}
    return HostScores(np.asarray(values, np.float32), tuple(errors), rows)


def together(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """All jobs at once, a daemon thread each; their results in order, or the first exception."""
    return [wait() for wait in [begin(job) for job in jobs]]


def begin(job: Callable[[], T]) -> Callable[..., T]:
    """The job in a daemon thread, which does not keep a process from ending; returns the wait for its result.

    `wait(seconds)` raises TimeoutError when it takes longer, and leaves the thread behind.
    """
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((job(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=run, daemon=True, name="host reward").start()

    def wait(seconds: float | None = None) -> T:
        try:
            result, error = box.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    return wait


class Ahead:
    """Scores on the way while the device does the next rollout.

    `submit` waits only while `limit` calls are unfinished: scores that come more slowly than images hold
    the rollout up, instead of filling the memory.
    """

    def __init__(self, host: HostScore | None, limit: int) -> None:
        self._host, self._waits = host, []
        self._room = threading.BoundedSemaphore(limit)

    def submit(self, images: Images, prompts: Sequence[str], ids: Sequence[str]) -> None:
        """Begin to score these finished images; nothing to do where nothing is scored on the host."""
        host = self._host
        if host is None:
            return

        def job() -> HostScores:
            try:
                return host(images, prompts, ids)
            finally:
                self._room.release()

        self._room.acquire()
        self._waits.append(begin(job))

    def gather(self) -> list[HostScores]:
        """All scores, in the order of their submission."""
        waits, self._waits = self._waits, []
        return [wait() for wait in waits]


def weighted(rewards: Mapping[str, HostScore], weights: Mapping[str, float]) -> HostScore | None:
    """Several host rewards as one: Σ weight · value, missing where a summand with a weight is missing."""
    if not rewards:
        return None

    def score(images: Images, prompts: Sequence[str], ids: Sequence[str]) -> HostScores:
        asked = [lambda one=one: one(images, prompts, ids) for one in rewards.values()]
        value = np.zeros(len(prompts), np.float32)
        errors = [""] * len(prompts)
        parts: dict[str, np.ndarray] = {}
        for name, scores in zip(rewards, together(asked), strict=True):
            parts[name] = scores.value
            parts |= {f"{name}/{part}": values for part, values in scores.parts.items()}
            if weights[name]:
                value = value + np.float32(weights[name]) * scores.value
            errors = [e or (n and f"{name}: {n}") for e, n in zip(errors, scores.errors, strict=True)]
        return HostScores(value, tuple(errors), parts)

    return score


def beside(judged: HostScore | None, logged: HostScore | None) -> HostScore | None:
    """The value of the first with the parts of both."""
    if judged is None and logged is None:
        return None

    def score(images: Images, prompts: Sequence[str], ids: Sequence[str]) -> HostScores:
        nothing = HostScores(np.zeros(len(prompts), np.float32), ("",) * len(prompts), {})
        asked = [lambda one=one: one(images, prompts, ids) if one else nothing for one in (judged, logged)]
        first, second = together(asked)
        errors = tuple(a or b for a, b in zip(first.errors, second.errors, strict=True))
        return HostScores(first.value, errors, {**second.parts, **first.parts})

    return score
