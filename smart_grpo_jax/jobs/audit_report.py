"""What an audit found: as a record, as JSON in the run folder, and as the table on the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import resumable
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.jobs import audit_numbers
from smart_grpo_jax.jobs.audit_numbers import Step
from smart_grpo_jax.maths import window
from smart_grpo_jax.runtime.progress import duration, table

FORMAT = 1
HOLDS_FOR = ("model.", "adapter.", "prompts.", "sampler.", "search.")
"""The sections of a config that an audit depends on, with the rewards that the search asks."""
INDIFFERENT = (
    "prompts.groups", "prompts.members", "prompts.cache", "sampler.eval_", "search.steps", "search.members",
    "search.credit", "search.offset", "search.execute", "search.chunk",
)  # fmt: skip
"""What changes neither its rollouts nor its search."""


class Audit(NamedTuple):
    """Steps and windows; `recommended` is over all steps that were searched, `usable` over those at which
    the run's sampler has noise. `holds_for` are the fields that a config must share to rely on it."""

    holds_for: dict[str, Any]
    weights: str
    seed: int
    prompts: int
    members: int
    finished: float
    group_std: float
    steps: tuple[Step, ...]
    recommended: tuple[int, ...]
    usable: tuple[int, ...]
    nfe: dict[str, int]
    seconds: float
    compile_seconds: float


def identity(config: Config) -> dict[str, Any]:
    """The fields on which an audit depends, by their dotted names."""
    values = configs.to_dict(config)
    asked = values["search_reward"] or values["rewards"]
    fields = {
        k: v
        for k, v in resumable.semantic(values).items()
        if k.startswith(HOLDS_FOR) and not k.startswith(INDIFFERENT)
    }
    return fields | {f"search_reward.{name}": entry for name, entry in asked.items()}


def span(found: Audit, steps: tuple[int, ...]) -> str:
    """Consecutive steps as a value of `search.steps` that any grid understands."""
    return window.span(np.array([*(s.t for s in found.steps), found.steps[-1].t_next]), steps)


def to_json(found: Audit) -> dict[str, Any]:
    """The record as JSON; windows stand there as steps and as times."""
    plain = found._asdict() | {"steps": [audit_numbers.to_json(step) for step in found.steps]}
    for name in ("recommended", "usable"):
        steps = getattr(found, name)
        plain[name] = {"steps": list(steps), "times": span(found, steps) if steps else None}
    numbers = {k: float(v) if np.isfinite(v) else None for k, v in plain.items() if isinstance(v, float)}
    return {"format": FORMAT} | plain | numbers


def from_json(stored: Mapping[str, Any]) -> Audit:
    """The record that `to_json` wrote; KeyError, TypeError or ValueError where it is not one."""
    if stored["format"] != FORMAT:
        raise ValueError(f"format {stored['format']}")
    read: dict[str, Any] = {name: stored[name] for name in Audit._fields}
    for name in ("finished", "group_std"):
        read[name] = float("nan") if stored[name] is None else stored[name]
    for name in ("recommended", "usable"):
        read[name] = tuple(stored[name]["steps"])
    read["steps"] = tuple(audit_numbers.from_json(step) for step in stored["steps"])
    return Audit(**read)


def digits(group_std: float) -> int:
    """Decimals that resolve a hundredth of the spread inside a group, whatever the scale of the reward."""
    return max(0, 2 - math.floor(math.log10(group_std))) if group_std > 0 else 3


def text(found: Audit) -> str:
    """The table of the screen and what follows from it."""
    header = [
        "step", "t", "fidelity [95 %]", "candidates'", "spread", "of group's", "product",
        "gain of the finished image [95 %]", "calls/image", "seconds", "",
    ]  # fmt: skip
    places = digits(found.group_std)
    lines = [
        f"{found.prompts} prompts × {found.members} images, weights: {found.weights}; finished images: "
        f"{found.finished:.{places}f}, spread inside a group {found.group_std:.{places}f}",
        table([row(found, step) for step in found.steps], header),
        *parts(found),
        "candidates' is the fidelity of the decodes that the search looks at; product is that × spread",
        conclusion(found),
        f"{found.nfe['velocity']:,} network calls in {duration(found.seconds)}, "
        f"{duration(found.compile_seconds)} to compile",
    ]
    return "\n".join(lines)


def row(found: Audit, step: Step) -> list[str]:
    """One step as text."""
    known = lambda value, form: format(value, form) if np.isfinite(value) else "–"
    places = digits(found.group_std)
    return [
        str(step.step), f"{step.t:.3f}", step.fidelity.words(2), known(step.judged.value, "+.2f"),
        known(step.spread, f".{places}f"), known(step.share, ".0%"), known(step.expected, f".{places}f"),
        step.gain.words(places),
        str(step.nfe or "–"), known(step.seconds, ".1f") if step.nfe else "–",
        "◀" if step.step in found.recommended else "",
    ]  # fmt: skip


def parts(found: Audit) -> list[str]:
    """A line per summand of the reward: where it gains most, and how faithful it is there."""
    lines = []
    for name in found.steps[0].parts:
        best = max(found.steps, key=lambda s: _or_low(s.parts[name][1].value))
        faithful, gain = (interval.words(2) for interval in best.parts[name])
        lines.append(
            f"{name}: gains most at step {best.step} (t = {best.t:.2f}): {gain}, fidelity there {faithful}"
        )
    return lines


def _or_low(value: float) -> float:
    return value if np.isfinite(value) else -np.inf


def conclusion(found: Audit) -> str:
    """The recommendation in words."""
    if not found.recommended:
        return "no step's gain is above 0 beyond doubt: nothing is recommended (more audit.prompts may tell)"
    said = f"recommended: search.steps={_indices(found.recommended)} (t = {span(found, found.recommended)})"
    if found.usable == found.recommended:
        return said
    if not found.usable:
        return said + "; this sampler.window has noise at none of the steps that gain"
    return said + f"; in this sampler.window: search.steps={_indices(found.usable)}"


def _indices(steps: tuple[int, ...]) -> str:
    return ",".join(map(str, steps))
