"""What two evaluations on equal noise say about each other: numpy, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

HEADLINE = {
    "reward": "reward",
    "shapes": "graded",
    "shapes/strict": "strict",
    "second/graded": "graded, second judge",
    "second/strict": "strict, second judge",
    "shapes_aesthetic": "aesthetic",
}
"""Scores that come first in a table, with their labels; others follow under their own names."""

NORMAL_95 = 1.96
"""Half-width of a 95 % interval in standard errors."""


class Change(NamedTuple):
    """What a sentence says about a paired difference: `better`, `worse` or `open` (the interval has 0)."""

    verdict: str
    words: str


def interval(difference: np.ndarray, prompts: Sequence[str] | None = None) -> tuple[float, float]:
    """Mean paired difference and the half-width of its 95 % interval (normal theory).

        d_p = mean over seeds,   mean_p d_p ± 1.96 √( c/(c-1) Σ_text (Σ_{p of text} (d_p - mean))² ) / n

    `difference[prompt, seed]`; NaN marks a failed score, and a prompt without any score does not count.
    A prompt that stands in the set several times is one of c clusters: its repeats are not independent.
    """
    per_prompt = per_prompt_mean(difference)
    kept = np.isfinite(per_prompt)
    texts = (
        np.arange(len(kept)) if prompts is None else np.unique(np.asarray(prompts), return_inverse=True)[1]
    )
    per_prompt, texts = per_prompt[kept], np.unique(texts[kept], return_inverse=True)[1]
    if len(per_prompt) == 0:
        return float("nan"), float("inf")
    clusters = np.bincount(texts, per_prompt - per_prompt.mean())
    if len(clusters) == 1:
        return float(per_prompt.mean()), float("inf")
    spread = np.sqrt(len(clusters) / (len(clusters) - 1) * (clusters**2).sum())
    return float(per_prompt.mean()), float(NORMAL_95 * spread / len(per_prompt))


def decimals(size: float) -> int:
    """Decimals that show a number of this size: three, or two digits of what is below 0.01."""
    size = abs(size)
    return 3 if not 0 < size < 0.01 else 1 - math.floor(math.log10(size))


def shown(value: float) -> str:
    """A score: `0.531`, `-0.0015`."""
    return f"{value:.{decimals(value)}f}"


def per_prompt_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the seeds that have a score: [prompts, seeds] -> [prompts], NaN where none has."""
    values = np.asarray(values, np.float64)
    there = np.isfinite(values)
    count = there.sum(axis=1)
    total = np.where(there, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean(values: np.ndarray) -> float:
    """Mean over the scores that are numbers; NaN where there is none."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")


def order(names: Sequence[str]) -> list[str]:
    """Headline scores first, in their order; the others by name."""
    return [n for n in HEADLINE if n in names] + sorted(n for n in names if n not in HEADLINE)


def distinct(scores: Mapping[str, np.ndarray]) -> list[str]:
    """Names in order, without those that repeat another: a mixture of one reward is that reward."""
    kept: list[str] = []
    ordered = order(list(scores))
    for name in [n for n in ordered if n != "reward"]:
        if not any(_equal(scores[name], scores[other]) for other in kept):
            kept.append(name)
    repeats = any(_equal(scores["reward"], scores[name]) for name in kept) if "reward" in scores else True
    return kept if repeats else ["reward", *kept]


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one, other, equal_nan=True)


def comparison(
    base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray], prompts: Sequence[str] | None = None
) -> list[dict[str, float | str]]:
    """One row per score that both have: label, name, base, tuned, paired difference and its half-width.

    Only pairs in which both scores are numbers count, so that `tuned - base` is the difference.
    """
    rows: list[dict[str, float | str]] = []
    for name in distinct({n: np.stack([base[n], tuned[n]]) for n in base if n in tuned}):
        both = np.isfinite(base[name]) & np.isfinite(tuned[name])
        before, after = (np.where(both, scores[name], np.nan) for scores in (base, tuned))
        difference, half = interval(after - before, prompts)
        rows.append(
            {
                "score": HEADLINE.get(name, name),
                "name": name,
                "base": mean(before),
                "tuned": mean(after),
                "difference": difference,
                "half_width": half,
            }
        )
    return rows


def change(row: Mapping[str, float | str]) -> Change:
    """A row of `comparison` in words: `0.521 → 0.668`, and the paired difference with its interval."""
    difference, half = float(row["difference"]), float(row["half_width"])
    base, tuned = (shown(float(row[name])) for name in ("base", "tuned"))
    words = f"{base} → {tuned}, paired difference {signed(difference, half)}"
    verdict = "better" if difference > half else "worse" if difference < -half else "open"
    return Change(verdict, words)


def signed(difference: float, half: float) -> str:
    """`+0.147 ± 0.021`; one prompt alone has no interval."""
    places = decimals(max(abs(difference), half) if np.isfinite(half) else difference)
    said = f"{difference:+.{places}f}"
    return f"{said} ± {half:.{places}f}" if np.isfinite(half) else f"{said} (no interval)"
