"""Expected results: the band in which a run of a shipped config ends, made from several seeds.

    python -m smart_grpo_jax.main --mode=compare 'runs/x/seed*' --expect=configs/expected/x.json
    python -m smart_grpo_jax.main --mode=compare runs/mine --reference=configs/expected/x.json

The band is for one further run with another seed on equal evaluation noise: mean ± t s √(1 + 1/S) over S
seeds, and never narrower than what two pictures of the set can move, which is rounding on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import compare_settings, compare_statistics, statistics
from smart_grpo_jax.jobs.compare_runs import Arm, Run
from smart_grpo_jax.runtime.files import storage, write_json

ENOUGH = 3
"""Seeds below which there is no band."""

MOVED = 2
"""Pictures that rounding may turn from right to wrong."""

JUDGED = tuple(statistics.HEADLINE)
"""Scores that have a band, where they are logged."""


def write(path: Path, arms: Sequence[Arm]) -> None:
    """Store the band of one arm."""
    if len(arms) != 1:
        raise UserError(f"--expect: got {len(arms)} arms ({', '.join(a.name for a in arms)}), wanted one")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, band(arms[0]))


def band(arm: Arm) -> dict[str, Any]:
    """The expected result of an arm: per score and evaluation, mean, low and high."""
    if len(arm.runs) < ENOUGH:
        raise UserError(f"--expect: got {len(arm.runs)} seeds of {arm.name}, wanted at least {ENOUGH}")
    epochs = [point.epoch for point in arm.runs[0].points]
    if any([point.epoch for point in run.points] != epochs for run in arm.runs):
        raise UserError(f"--expect: the runs of {arm.name} were evaluated at different epochs")
    scores = {name: _bands(arm, name) for name in statistics.distinct(_last(arm)) if name in JUDGED}
    return {
        "seeds": arm.seeds,
        "machine": arm.runs[0].machine,
        "prompts": len(arm.runs[0].prompts),
        "settings": compare_settings.changed(arm.runs[0].config),
        "epochs": epochs,
        "scores": scores,
    }


def _last(arm: Arm) -> dict[str, np.ndarray]:
    return {name: arm.last(name) for name in arm.scores()}


def _bands(arm: Arm, score: str) -> dict[str, list[float]]:
    found = []
    for k in range(len(arm.runs[0].points)):
        values = np.stack([run.points[k].scores[score] for run in arm.runs])
        mean, low, high = compare_statistics.prediction(np.nanmean(values, 1))
        least = MOVED * float(np.nanmax(values) - np.nanmin(values)) / values.shape[1]
        found.append((mean, min(low, mean - least), max(high, mean + least)))
    return {name: [round(v[i], 5) for v in found] for i, name in enumerate(("mean", "low", "high"))}


def check(path: Path, arms: Sequence[Arm]) -> list[str]:
    """One sentence per run: inside or outside, and by what the config differs if it does."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [line for arm in arms for run in arm.runs for line in _verdict(stored, run)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--reference: {path} is no expected result ({type(error).__name__})") from None


def _verdict(stored: Mapping[str, Any], run: Run) -> list[str]:
    name = f"{run.arm}, seed {run.seed}"
    mine = compare_settings.changed(run.config)
    differ = [
        k for k in sorted(mine.keys() | stored["settings"].keys()) if mine.get(k) != stored["settings"].get(k)
    ]
    last = run.points[-1]
    if last.epoch not in stored["epochs"]:
        return [f"{name}: ends at epoch {last.epoch}; the expected result has epochs {stored['epochs']}"]
    k = stored["epochs"].index(last.epoch)
    lines = []
    for score, b in stored["scores"].items():
        if score in last.scores:
            value = statistics.mean(last.scores[score])
            inside = b["low"][k] <= value <= b["high"][k]
            said, low, high = map(statistics.shown, (value, b["low"][k], b["high"][k]))
            lines.append(
                f"{name}: {statistics.HEADLINE.get(score, score)} {said} at epoch {last.epoch} is "
                f"{'inside' if inside else 'OUTSIDE'} [{low}, {high}], the 95 % band "
                f"of a run ({len(stored['seeds'])} seeds, {stored['machine']})"
            )
    if differ:
        lines.append(f"{name}: its settings differ from the expected run's: {', '.join(differ[:5])}")
    return lines
