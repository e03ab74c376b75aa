"""Which steps are noisy and which of them are trained, epoch by epoch.

Every kind is a pure function of (num_steps, epoch, seed) and its options. The number of trained steps
never depends on the epoch, so a moving window recompiles nothing. docs/algorithm.md, section 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from smart_grpo_jax.maths.choice import choose

LATE = 0.61
EARLY = (0.65, 0.95)


class Window(NamedTuple):
    """`stochastic` marks the noisy steps (the rest are Euler's), `trained` lists those that are learned."""

    stochastic: Bool[np.ndarray, " steps"]
    trained: Int[np.ndarray, " trained"]


def _all(num_steps: int, epoch: int, seed: int, *, noise_last: bool = False) -> Window:
    """Noise at all steps but the last, all of them trained. `noise_last` adds noise to the last one, as
    flow_grpo's first code did; it is never trained: its Gaussian is too narrow (0.006)."""
    del epoch, seed
    stochastic = np.ones(num_steps, bool)
    stochastic[-1] = noise_last
    return Window(stochastic, _steps(0, num_steps - 1))


def _fraction(
    num_steps: int, epoch: int, seed: int, *, fraction: float = 0.99, noise_last: bool = False
) -> Window:
    """Noise as in "all"; trained on the first int(fraction * steps) steps (flow_grpo's timestep_fraction)."""
    if not 0 < fraction <= 1:
        raise ValueError(f"window fraction: got {fraction}, want 0 < fraction <= 1")
    count = min(max(int(num_steps * fraction + 1e-9), 1), num_steps - 1)
    return _all(num_steps, epoch, seed, noise_last=noise_last)._replace(trained=_steps(0, count))


def _fixed(num_steps: int, epoch: int, seed: int, *, start: int = 1, size: int = 3) -> Window:
    """Noise and training at [start, start + size) only."""
    del epoch, seed
    if start < 0 or size < 1 or start + size > num_steps:
        raise ValueError(f"window: got start={start}, size={size}, want them inside {num_steps} steps")
    stochastic = np.zeros(num_steps, bool)
    stochastic[start : start + size] = True
    return Window(stochastic, _steps(start, start + size))


def _random(
    num_steps: int, epoch: int, seed: int, *, size: int = 3, low: int = 0, high: int | None = None
) -> Window:
    """A window of `size` steps inside [low, high), drawn anew for each epoch from (seed, epoch) alone;
    `high` is the last step unless given (Flow-GRPO-Fast)."""
    high = num_steps - 1 if high is None else high
    if low < 0 or high > num_steps or size < 1 or high - size < low:
        raise ValueError(f"window random: got size={size} in [{low}, {high}), want room in {num_steps} steps")
    start = np.random.default_rng([seed, epoch]).integers(low, high - size, endpoint=True)
    return _fixed(num_steps, epoch, seed, start=int(start), size=size)


def _sliding(
    num_steps: int,
    epoch: int,
    seed: int,
    *,
    size: int = 4,
    stride: int = 1,
    every: int = 25,
    wraps: bool = True,
) -> Window:
    """A window that moves by `stride` each `every` epochs; at the end it starts over or stays (MixGRPO)."""
    if size < 1 or stride < 1 or every < 1 or size > num_steps - 1:
        raise ValueError(
            f"window sliding: got size={size}, stride={stride}, every={every}, want each at least 1 and "
            f"size below the {num_steps} steps"
        )
    places = (num_steps - 1 - size) // stride + 1
    turn = epoch // every
    place = turn % places if wraps else min(turn, places - 1)
    return _fixed(num_steps, epoch, seed, start=place * stride, size=size)


WINDOWS = {"all": _all, "fraction": _fraction, "fixed": _fixed, "random": _random, "sliding": _sliding}


def window(kind: str, num_steps: int, epoch: int = 0, seed: int = 0, **options) -> Window:
    """The window of one epoch; an option that the kind does not have is a ValueError."""
    build = choose(WINDOWS, kind, "window")
    if num_steps < 2:
        raise ValueError(f"window: got {num_steps} steps, want at least 2 (the last is deterministic)")
    known = {k: p for k, p in inspect.signature(build).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in options:
        choose(known, name, f"option of window {kind!r}")
    return build(num_steps, epoch, seed, **options)


def step_mask(
    spec: str | Sequence[int],
    num_steps: int,
    times: np.ndarray,
    stochastic: Bool[np.ndarray, " steps"] | None = None,
) -> Bool[np.ndarray, " steps"]:
    """The steps at which to search: a list of indices, or "all", "none", "late" (t <= 0.61), "early"
    (0.65 <= t <= 0.95), or "a..b", the steps that begin at a < t <= b.

    Only noisy steps have noise to search: what is not in `stochastic` is left out. Without it, the
    names leave out the last step and a list stands as it is.
    """
    t = np.asarray(times, np.float64)[:num_steps]
    if not isinstance(spec, str):
        steps = np.asarray(list(spec), int)
        if ((steps < 0) | (steps >= num_steps)).any():
            raise ValueError(f"search steps: got {list(spec)}, want indices from 0 to {num_steps - 1}")
        mask = np.isin(np.arange(num_steps), steps)
        return mask if stochastic is None else mask & stochastic
    # The grid is float32: 0.65 may stand there as 0.64999998.
    named = {
        "all": np.ones(num_steps, bool),
        "none": np.zeros(num_steps, bool),
        "late": t <= LATE + 1e-6,
        "early": (t >= EARLY[0] - 1e-6) & (t <= EARLY[1] + 1e-6),
    }
    noisy = np.arange(num_steps) < num_steps - 1 if stochastic is None else stochastic
    if ".." in spec:
        named[spec] = _between(spec, t)
    return choose(named, spec, "search steps") & noisy


def span(times: np.ndarray, steps: Sequence[int]) -> str:
    """A window of consecutive steps as times, "a..b": what it is on a grid with another number of steps.

    Half-open, so that on its own grid it is these steps, and on one twice as fine both halves of each.
    """
    return f"{float(times[max(steps) + 1]):.6f}..{float(times[min(steps)]):.6f}"


def _between(spec: str, t: Float[np.ndarray, " steps"]) -> Bool[np.ndarray, " steps"]:
    """Steps of the grid that begin in (low, high]; where it is too coarse to have one, the nearest."""
    try:
        low, high = map(float, spec.split(".."))
    except ValueError:
        raise ValueError(f'search steps: got "{spec}", want two times such as 0.55..0.9') from None
    inside = (t > low + 1e-6) & (t <= high + 1e-6)
    return inside if inside.any() else np.arange(len(t)) == np.abs(t - (low + high) / 2).argmin()


def _steps(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype=np.int32)
