"""`--sweep=v5e:2x4,v5e:4x4@fsdp=4,v6e:8`: one plan per slice and mesh, side by side.

Every answer of a compiler is kept beside `--json`: a long sweep can be broken off and goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smart_grpo_jax.core.config import Config, Mesh
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.jobs import plan, plan_numbers
from smart_grpo_jax.jobs.plan_numbers import Plan
from smart_grpo_jax.runtime import topologies
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.progress import duration, say, table
from smart_grpo_jax.runtime.topologies import GIB, Topology

HEAD = ("slice", "mesh", "fits", "rollout", "update", "evaluate", "usable", "epoch", "device-hours", "sent")


def job(config: Config, wanted: str, exact: bool = False, out: str = "") -> bool:
    """Plan for every slice, print the table, write it as data; True where any of them fits."""
    pairs = [parse(config, text) for text in wanted.split(",") if text.strip()]
    if not pairs:
        raise UserError("--sweep: is empty, wanted slices such as v5e:2x4,v5e:4x4@fsdp=4")
    ask = plan.asker(exact, out)
    found: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for changed, topology in pairs:
        made = plan.planned(changed, topology, ask)
        found.append(plan_numbers.summary(made))
        rows.append(row(made, found[-1]))
        if out:
            write_atomic(Path(out), (json.dumps({"plans": found}, indent=1) + "\n").encode())
    say(table(rows, HEAD))
    say("GiB on a device, an epoch from every unit busy to a quarter of that, GiB that a device sends")
    return any(one["fits"] for one in found)


def parse(config: Config, text: str) -> tuple[Config, Topology]:
    """A slice, perhaps with its mesh: `v5e:4x4@fsdp=4+tensor=2`."""
    name, _, mesh = text.strip().partition("@")
    known = [field.name for field in dataclasses.fields(Mesh)]
    sizes: dict[str, int] = {}
    for part in filter(None, mesh.split("+")):
        axis, _, size = part.partition("=")
        if axis not in known:
            raise UserError(f'--sweep: got "{part}" ({nearest(axis, known)})')
        if not size.isdecimal() and size != "auto":
            raise UserError(f'--sweep: got "{part}", wanted a number of devices, or auto')
        sizes[axis] = 0 if size == "auto" else int(size)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes)), topologies.parse(name)


def row(made: Plan, found: dict[str, Any]) -> list[str]:
    """One slice."""
    chip, phases = made.topology.chip, {p.name: p for p in made.phases}
    totals = [f"{phases[n].total / GIB:.1f}" if n in phases and phases[n].total else "" for n in plan.PHASES]
    span, hours = found["epoch_seconds"], found["device_hours_per_epoch"]
    return [
        made.topology.name,
        " × ".join(str(size) for size in made.mesh.values()),
        answer(made),
        *totals,
        f"{chip.usable / GIB:.2f}" if chip else "",
        f"{duration(span[0])} … {duration(span[1])}" if span else "",
        f"{hours[0]:,.2f} … {hours[1]:,.2f}" if hours else "",
        f"{plan_numbers.sent_per_device(made.phases) / GIB:,.1f}",
    ]


def answer(made: Plan) -> str:
    """Yes, or the verdict of the first phase that says no."""
    bad: Sequence[str] = [p.verdict for p in made.phases if p.verdict not in ("fits", plan_numbers.COUNTED)]
    return "yes" if made.fits else (bad[0] if bad else "no")
