"""Intervals for the difference of two methods: both the prompts and the runs of training are samples.

    d[s, p] = δ + a_s + b_p + e_sp         run s (seed of training), prompt p

A few seeds cannot show by resampling what tails the law of seeds has: drawing five of five with
replacement gives intervals that are too short by a third. So prompts are resampled and the seeds' part is
drawn from Student's law,

    δ* = d̄ + κ (d̄*_prompts - d̄) + T_{S-1} √(Var_s(d̄_s) / S),     κ² = max(0, V_p - V_e) / V_p,

where V_p is the variance of the prompts' means over seeds and V_e the share of e_sp in it: κ takes out what
the spread of the seeds already holds. Prompts of equal text are one: they are drawn together.
tests/jobs/test_compare_statistics.py measures how often such intervals hold the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from smart_grpo_jax.jobs import statistics

LEVEL = 0.95
DRAWS = 4000
"""Resamplings of the prompts."""
STUDENTS = 3
"""Draws from Student's law for each of them: the tails are its."""


class Interval(NamedTuple):
    """The mean difference and its 95 % interval; how many seeds and prompts it rests on."""

    difference: float
    low: float
    high: float
    seeds: tuple[int, int]
    prompts: int
    paired: bool
    alone: bool  # a training that was not repeated: the interval knows of prompts only

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `open` (the interval has 0), or `one seed`."""
        if self.alone:
            return "one seed"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "open"


WORDS = {
    "better": "better",
    "worse": "worse",
    "open": "no difference shown",
    "one seed": "one seed: nothing is said of a repetition",
}
"""Verdicts for a reader."""


def told(row: Mapping[str, Any]) -> str:
    """`+0.031 [+0.010, +0.052]`."""
    numbers = [row[name] for name in ("difference", "low", "high")]
    places = statistics.decimals(max(map(abs, numbers)))
    return "{} [{}, {}]".format(*(f"{number:+.{places}f}" for number in numbers))


class _Sample(NamedTuple):
    """One set of runs, and the text of each prompt as a number."""

    values: Float[np.ndarray, "s p"]
    texts: Int[np.ndarray, " p"]

    @property
    def seeds(self) -> int:
        return len(self.values)

    def seed_error(self) -> float:
        """Standard error of the mean over seeds."""
        means = self.values.mean(1)
        return float(means.std(ddof=1) / np.sqrt(self.seeds)) if self.seeds > 1 else 0.0

    def residual(self) -> float:
        """Σ over texts of the square of e's part in the mean over seeds."""
        if self.seeds < 2:
            return 0.0
        rest = self.values - self.values.mean(0) - self.values.mean(1, keepdims=True) + self.values.mean()
        squares = sum(float((np.bincount(self.texts, row) ** 2).sum()) for row in rest)
        return squares / (self.seeds * (self.seeds - 1))


def difference(
    one: Float[np.ndarray, "s p"],
    other: Float[np.ndarray, "r p"],
    prompts: Sequence[str] | None = None,
    *,
    paired: bool = False,
    repeated: tuple[bool, bool] = (True, True),
    level: float = LEVEL,
) -> Interval:
    """The interval of mean(one) - mean(other); rows are seeds, columns the same prompts on equal noise.

    `paired`: row s of both is the same seed. `repeated` is False for what was not trained, and would come
    out the same another time. Prompts without a score in any run are left out, and prompts
    of equal text are drawn together. The same arguments give the same interval.
    """
    known = np.asarray(np.isfinite(one).all(0) & np.isfinite(other).all(0))
    one, other = one[:, known].astype(np.float64), other[:, known].astype(np.float64)
    count, seeds = int(known.sum()), (len(one), len(other))
    alone = any(again and rows < 2 for again, rows in zip(repeated, seeds, strict=True))
    if count == 0:
        nothing = float("nan")
        return Interval(nothing, nothing, nothing, seeds, 0, paired, alone)
    texts = _clusters(prompts, known)
    samples = [_Sample(one - other, texts)] if paired else [_Sample(one, texts), _Sample(other, texts)]
    mean, per_prompt = float(one.mean() - other.mean()), one.mean(0) - other.mean(0)
    drawn = mean + _shrink(samples, per_prompt) * (_prompt_means(per_prompt, texts) - mean)
    spread = np.tile(drawn, STUDENTS)
    rng = np.random.default_rng(20_251_002)
    error, freedom = _seeds(samples)
    if error > 0:
        spread = spread + error * rng.standard_t(freedom, len(spread))
    tail = (1 - level) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), seeds, count, paired, alone)


def _seeds(samples: Sequence[_Sample]) -> tuple[float, float]:
    """Standard error of the difference over seeds, and its degrees of freedom (Welch where not paired)."""
    squares = [(sample.seed_error() ** 2, sample.seeds - 1) for sample in samples if sample.seeds > 1]
    total = sum(square for square, _ in squares)
    if total == 0:
        return 0.0, 1.0
    return float(np.sqrt(total)), total**2 / sum(square**2 / freedom for square, freedom in squares)


def _clusters(prompts: Sequence[str] | None, known: np.ndarray) -> np.ndarray:
    """The index of each kept prompt's text."""
    if prompts is None:
        return np.arange(int(known.sum()))
    return np.unique(np.asarray(prompts)[known], return_inverse=True)[1]


def _shrink(samples: Sequence[_Sample], per_prompt: Float[np.ndarray, " p"]) -> float:
    """κ: the share of the texts' spread that is not already in the spread of the seeds."""
    texts = samples[0].texts
    total = float((np.bincount(texts, per_prompt - per_prompt.mean()) ** 2).sum())
    rest = sum(sample.residual() for sample in samples)
    return float(np.sqrt(max(0.0, total - rest) / total)) if total > 0 else 0.0


def _prompt_means(
    per_prompt: Float[np.ndarray, " p"], texts: Int[np.ndarray, " p"]
) -> Float[np.ndarray, " draws"]:
    """Means of the difference over resampled texts, widened by √(n/(n-1)) for their finite number."""
    sizes, sums = np.bincount(texts), np.bincount(texts, per_prompt)
    if len(sizes) < 2:
        return np.full(DRAWS, per_prompt.mean())
    picked = _picks(len(sizes))
    drawn = (picked @ sums) / (picked @ sizes)
    return per_prompt.mean() + np.sqrt(len(sizes) / (len(sizes) - 1)) * (drawn - per_prompt.mean())


@functools.lru_cache(maxsize=4)
def _picks(count: int) -> Float[np.ndarray, "draws count"]:
    """How often each of `count` texts is drawn in each resampling."""
    return (
        np.random.default_rng(2_510).multinomial(count, np.full(count, 1 / count), DRAWS).astype(np.float64)
    )


def prediction(values: Float[np.ndarray, " s"], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean and the band in which one further run falls: mean ± t_{S-1} s √(1 + 1/S)."""
    s = len(values)
    if s < 2:
        return float(values.mean()), float("-inf"), float("inf")
    half = student(s - 1, level) * float(values.std(ddof=1)) * np.sqrt(1 + 1 / s)
    mean = float(values.mean())
    return mean, mean - half, mean + half


@functools.cache
def student(freedom: int, level: float = LEVEL) -> float:
    """The two-sided quantile of Student's law, by bisection of its integral."""
    tail = 1 - (1 - level) / 2
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < tail else (low, middle)
    return (low + high) / 2


def _below(t: float, freedom: int) -> float:
    """P(T ≤ t), t ≥ 0: with tan θ = t/√ν the density is cos^{ν-1} θ over its own integral."""
    angle = np.arctan(t / np.sqrt(freedom))
    part, whole = (np.linspace(0, end, 4001) for end in (angle, np.pi / 2))
    area = lambda grid: float(np.trapezoid(np.cos(grid) ** (freedom - 1), grid))
    return 0.5 + 0.5 * area(part) / area(whole)
