"""The arithmetic of the audit: rank correlation, intervals over prompts, and the rule that names a window.

Numpy alone; docs/audit.md explains what each number means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

DRAWS = 2000
"""Bootstrap samples: the ends of a 95 % interval then repeat themselves to a few percent of its width."""
WITHIN_REACH = 0.5
"""Share of the best step's gain that a step must reach to stand in its window."""


class Interval(NamedTuple):
    """A mean and its 95 % interval; NaN where one prompt, or none, has the number."""

    value: float
    low: float
    high: float

    def words(self, digits: int = 3) -> str:
        """`+0.151 [+0.113, +0.190]`."""
        if not np.isfinite(self.value):
            return "–"
        value, low, high = (f"{v:+.{digits}f}" for v in self)
        return f"{value} [{low}, {high}]" if np.isfinite(self.low) else value


class Step(NamedTuple):
    """What the audit found at one step of the sampler, which goes from `t` to `t_next`.

    `fidelity` is that of the state's own decode, `judged` that of the decodes which the search compares:
    where `search.space` is "transition" they are made after the step. `spread` is over the candidates of a
    state, `share` is it over the spread of a group's finished images. `gain` and `spread` are NaN where the
    step was not searched; `parts` holds fidelity and gain of each summand of the reward.
    """

    step: int
    t: float
    t_next: float
    noisy: bool
    fidelity: Interval
    judged: Interval
    spread: float
    share: float
    gain: Interval
    seconds: float
    nfe: int
    parts: dict[str, tuple[Interval, Interval]]

    @property
    def expected(self) -> float:
        """What choosing among candidates of this spread is worth to a judge of this fidelity."""
        return max(self.judged.value, 0.0) * self.spread


def ranks(values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Ranks from 0; ties share the middle of theirs."""
    below = (values[:, None] > values[None]).sum(1)
    return below + ((values[:, None] == values[None]).sum(1) - 1) / 2


def spearman(early: Float[np.ndarray, " m"], final: Float[np.ndarray, " m"]) -> float:
    """Rank correlation of two scores of one prompt's images.

    Images that lack a score do not count. Where all finished images score alike there is no order to
    predict: NaN. An early score that is the same for all predicts nothing: 0.
    """
    known = np.isfinite(early) & np.isfinite(final)
    a, b = ranks(early[known]), ranks(final[known])
    if len(b) < 2 or np.ptp(b) == 0:
        return float("nan")
    if np.ptp(a) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def fidelity(
    early: Float[np.ndarray, "p m"], final: Float[np.ndarray, "p m"], texts: Sequence[str]
) -> Interval:
    """The mean of `spearman` over groups."""
    return bootstrap(np.array([spearman(a, b) for a, b in zip(early, final, strict=True)]), texts)


def bootstrap(values: Float[np.ndarray, " p"], texts: Sequence[str]) -> Interval:
    """The mean over groups, and the middle 95 % of the means of resampled prompts.

    A prompt that has several groups is drawn with all of them: its groups are not independent. The
    resamples are the same in every call, so that the intervals of two steps compare.
    """
    kept = np.isfinite(values)
    if not kept.any():
        return Interval(float("nan"), float("nan"), float("nan"))
    prompt = np.unique(np.asarray(texts)[kept], return_inverse=True)[1]
    total, count = np.bincount(prompt, values[kept]), np.bincount(prompt)
    mean = float(values[kept].mean())
    if len(total) < 2:
        return Interval(mean, float("nan"), float("nan"))
    drawn = np.random.default_rng(0).integers(len(total), size=(DRAWS, len(total)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def spread(rewards: Float[np.ndarray, "... k"]) -> float:
    """The mean over all but the last axis of the sample std along it; what is not finite does not count."""
    values = np.asarray(rewards, np.float64)
    known = np.isfinite(values)
    count = known.sum(-1)
    mean = np.where(known, values, 0).sum(-1) / np.maximum(count, 1)
    square = np.where(known, (values - mean[..., None]) ** 2, 0).sum(-1) / np.maximum(count - 1, 1)
    enough = count >= 2
    return float(np.sqrt(square[enough]).mean()) if enough.any() else float("nan")


def qualified(steps: Sequence[Step], allowed: Bool[np.ndarray, " s"]) -> Bool[np.ndarray, " s"]:
    """The steps that may stand in a window: a gain whose interval is above 0 and that is at least half the
    best one, under a judge whose order is not certainly the wrong way round."""
    gain = np.array([s.gain.value for s in steps])
    proven = np.array([s.gain.low > 0 and not s.judged.high < 0 for s in steps]) & allowed
    if not proven.any():
        return proven
    return proven & (gain >= WITHIN_REACH * gain[proven].max())


def recommend(steps: Sequence[Step], allowed: Bool[np.ndarray, " s"], most: int) -> tuple[int, ...]:
    """The window: the unbroken run of qualified steps around the one that gains most, at most `most` long.

    Every searched step costs the same, so gain per cost is gain. A run that is too long is cut to the
    stretch with the best one in it that gains most in sum; the earlier of two equal ones.
    """
    good = qualified(steps, allowed)
    if not good.any():
        return ()
    gain = np.where(good, [s.gain.value for s in steps], -np.inf)
    best = first = last = int(np.argmax(gain))
    while first > 0 and good[first - 1]:
        first -= 1
    while last + 1 < len(steps) and good[last + 1]:
        last += 1
    size = min(most, last - first + 1)
    starts = range(max(first, best - size + 1), min(best, last - size + 1) + 1)
    start = max(starts, key=lambda s: (gain[s : s + size].sum(), -s))
    return tuple(range(start, start + size))


def to_json(step: Step) -> dict[str, Any]:
    """A step as JSON: intervals are lists, null is for what is not known."""
    plain = step._asdict()
    parts = {name: {"fidelity": _list(f), "gain": _list(g)} for name, (f, g) in step.parts.items()}
    plain |= {
        "fidelity": _list(step.fidelity),
        "judged": _list(step.judged),
        "gain": _list(step.gain),
        "parts": parts,
    }
    return {k: _known(v) if isinstance(v, float) else v for k, v in plain.items()}


def from_json(stored: Mapping[str, Any]) -> Step:
    """The step that `to_json` wrote."""
    parts = {k: (_interval(v["fidelity"]), _interval(v["gain"])) for k, v in stored["parts"].items()}
    read = {name: stored[name] for name in ("step", "noisy", "nfe")}
    read |= {name: _float(stored[name]) for name in ("t", "t_next", "spread", "share", "seconds")}
    read |= {name: _interval(stored[name]) for name in ("fidelity", "judged", "gain")}
    return Step(**read, parts=parts)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _list(interval: Interval) -> list[float | None]:
    return [_known(v) for v in interval]


def _interval(stored: Sequence[float | None]) -> Interval:
    return Interval(*map(_float, stored))
