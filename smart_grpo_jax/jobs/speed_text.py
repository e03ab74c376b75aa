"""The numbers of jobs/speed.py in words: a line on the screen, rows of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PHASES = ("rollout", "host rewards", "update", "evaluate", "save", "compile", "other")
"""What is timed: between two lines, every second belongs to one of these."""

ROLLOUT = ("path", "search", "decode", "reward")
"""The parts of the rollout's work: the executed steps, everything that the search asks for, and what the
finished images cost. `update` is the fifth part of an epoch."""

SHOWN = 0.01
"""The least share that is told of."""

SHORT = {"evaluate": "eval", "other": ""}
"""Phases on the line, where their names differ; what is missing to 100 % there is `other`."""


def name_of(phase: str) -> str:
    """The name of a phase's share in the log."""
    return f"wall/share/{phase.replace(' ', '_')}"


def line(scalars: Mapping[str, Any]) -> str:
    """What stands below the line of an epoch; "" where there is nothing to tell.

    `MFU 31.2% | 12.3 img/s/dev | 1,234 NFE/s | rollout 61% (search 74 decode 2 reward 4) update 30% …`

    Shares of the time since the last line; in brackets % of the rollout's work, whose rest is its path.
    """
    if "wall/flops_per_second" not in scalars:
        return ""
    inside = {part: scalars.get(f"work/{part}", 0.0) for part in ROLLOUT}
    split = [f"{part} {100 * own / sum(inside.values()):.0f}" for part, own in inside.items()]
    times = []
    for phase in PHASES:
        share, short = scalars.get(name_of(phase), 0.0), SHORT.get(phase, phase)
        if share >= SHOWN and short:
            times.append(f"{short} {share:.0%}" + (f" ({' '.join(split[1:])})" if phase == "rollout" else ""))
    return "  " + " | ".join(
        [
            rate(scalars),
            f"{quantity(scalars['wall/images_per_second_per_device'])} img/s/dev",
            f"{quantity(scalars['wall/nfe_per_second'])} NFE/s",
            " ".join(times),
        ]
    )


def rate(scalars: Mapping[str, Any], phase: str = "") -> str:
    """The utilisation, or operations per second where nobody publishes a peak."""
    if (share := scalars.get(f"wall/mfu{phase}")) is not None:
        return f"MFU {100 * share:.1f}%"
    operations = scalars.get(f"wall/flops_per_second{phase}", 0.0)
    unit, name = next((u, n) for u, n in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (0, "M")) if operations >= u)
    return f"{quantity(operations / (unit or 1e6))} {name}FLOP/s"


def quantity(value: float) -> str:
    """Three digits or four, as `0.0123`, `1.23`, `45.6`, `1,234`, `12.3k`."""
    if not math.isfinite(value) or value <= 0:
        return "0"
    if value >= 1e4:
        return quantity(value / 1e3) + "k"
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}"


def rows(last: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a report tells of the newest line that has such numbers: (what, value)."""
    if "wall/flops_per_second" not in last:
        return []
    shares = [f"{phase} {share:.0%}" for phase in PHASES if (share := last.get(name_of(phase), 0)) >= SHOWN]
    parts = [f"{part} {last[f'work/{part}']:.0%}" for part in (*ROLLOUT, "update") if f"work/{part}" in last]
    return [
        ("speed", rate(last)),
        ("of it in rollouts", rate(last, "/rollout")),
        ("of it in updates", rate(last, "/update")),
        ("images per second and device", quantity(last["wall/images_per_second_per_device"])),
        ("network calls per second", quantity(last["wall/nfe_per_second"])),
        ("where time goes", ", ".join(shares)),
        ("where operations go", ", ".join(parts)),
    ]
