"""`--mode=plan --topology=v5e:4x4`: does this config fit that slice, and what would it cost?

Every program of an epoch is compiled for the slice on this machine, without weights, by the compiler that
the slice itself uses; what it says of memory is an answer and not an estimate. Times are: operations are
counted by us (maths/flops.py), traffic is read from the compiled programs, peaks are published ones. The
interval is from "every unit always busy" to a utilisation of LOW.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime import aot, topologies
from smart_grpo_jax.runtime.aot import FITS, TOO_LARGE
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.progress import Heartbeat, duration, say, table
from smart_grpo_jax.runtime.topologies import GIB, Topology

CHILD = "smart_grpo_jax.jobs.plan_compile"
PHASES = ("rollout", "update")
QUICK, EXACT = 1800.0, 7200.0
"""Seconds that a compiler may take."""

LOW = 0.25
"""The lower utilisation of the interval: where XLA's attention left an SD3-sized network (25 to 35 %)."""


class Phase(NamedTuple):
    """What is known of one program: its verdict, what was measured, and the reason where it does not fit."""

    name: str
    verdict: str
    found: Mapping[str, Any]
    reason: str

    @property
    def total(self) -> float:
        """Bytes on a device while it runs: its own peak, and what else lies there."""
        return self.found.get("peak_bytes", 0.0) + self.found.get("resident_bytes", 0.0)


def job(config: Config, name: str, exact: bool = False, out: str = "") -> bool:
    """Plan, print, and write JSON where it is asked for; True where everything fits."""
    topology = topologies.parse(name)
    phases = [phase(config, topology, one, exact) for one in PHASES]
    plan = summary(topology, phases)
    say(text(topology, phases, plan))
    if out:
        write_atomic(Path(out), (json.dumps(plan, indent=1) + "\n").encode())
    return bool(plan["fits"])


def phase(config: Config, topology: Topology, name: str, exact: bool) -> Phase:
    """One program, compiled in a process of its own."""
    compiles = topology.chip is None or topology.chip.platform == "tpu"
    if compiles and topology.chip is not None and importlib.util.find_spec("libtpu") is None:
        raise UserError('--mode=plan: libtpu is not installed, wanted pip install "smart_grpo_jax[plan]"')
    host = topology if compiles else Topology("cpu", "", topology.chips)
    request = {
        "config": configs.to_dict(config),
        "topology": host.name,
        "program": name,
        "compile": compiles,
    }
    with Heartbeat(f"compiling the {name} for {topology.name}"):
        limit = EXACT if exact else QUICK
        done = aot.child(CHILD, request, aot.environment(host, exact), limit)
    if not compiles:
        return Phase(name, "counted, not compiled", done.found, done.reason)
    made = Phase(name, done.verdict, done.found, done.reason)
    limit_bytes = topology.chip.usable if topology.chip else float("inf")
    if made.verdict == FITS and made.total > limit_bytes:
        reason = f"{made.total / GIB:.1f} GiB with what else lies there, {limit_bytes / GIB:.2f} usable"
        return made._replace(verdict=TOO_LARGE, reason=reason)
    return made


def seconds(topology: Topology, one: Phase) -> tuple[float, float]:
    """The interval of one program's time in an epoch; (0, 0) where there is nothing to tell it from."""
    chip, found = topology.chip, one.found
    if chip is None or "flops" not in found:
        return 0.0, 0.0
    compute = found["times"] * found["flops"] / topology.chips / chip.flops
    traffic = found["times"] * sum(found.get("sent_bytes", {}).values()) / chip.ici
    return max(compute, traffic), compute / LOW + traffic


def summary(topology: Topology, phases: list[Phase]) -> dict[str, Any]:
    """The plan as plain data."""
    spans = [seconds(topology, one) for one in phases]
    low, high = (sum(span[i] for span in spans) for i in (0, 1))
    flops = sum(p.found.get("times", 0) * p.found.get("flops", 0.0) for p in phases)
    images = max((p.found.get("images", 0) for p in phases), default=0)
    chip = topology.chip
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "fits": all(p.verdict == FITS for p in phases),
        "limit_bytes": chip.usable if chip else None,
        "mesh": next((p.found["mesh"] for p in phases if "mesh" in p.found), None),
        "flops_per_epoch": flops,
        "flops_per_image": flops / images if images else 0.0,
        "epoch_seconds": [low, high] if chip else None,
        "device_hours_per_epoch": [topology.chips * s / 3600 for s in (low, high)] if chip else None,
        "phases": {
            p.name: {"verdict": p.verdict, "reason": p.reason, "total_bytes": p.total, **p.found}
            | ({"seconds": list(span)} if chip else {})
            for p, span in zip(phases, spans, strict=True)
        },
    }


def text(topology: Topology, phases: list[Phase], plan: Mapping[str, Any]) -> str:
    """The plan for a person."""
    size = lambda value: "" if value is None else f"{value / GIB:.2f}"
    rows = []
    for one in phases:
        f, span = one.found, seconds(topology, one)
        rows.append(
            [
                one.name,
                one.verdict,
                *(
                    size(f.get(key))
                    for key in ("argument_bytes", "temp_bytes", "peak_bytes", "resident_bytes")
                ),
                size(one.total) if one.total else "",
                f"{f.get('times', 0) * f.get('flops', 0.0) / 1e15:,.1f}" if "flops" in f else "",
                f"{span[0]:,.0f} … {span[1]:,.0f}" if span[1] else "",
            ]
        )
    head = ["phase", "verdict", "arguments", "temporary", "peak", "beside it", "total", "PFLOP", "seconds"]
    lines = [table(rows, head), *(f"{p.name}: {p.reason}" for p in phases if p.reason)]
    lines += [largest(one) for one in phases if one.found.get("buffers")]
    mesh = plan["mesh"] or {}
    chip = topology.chip
    where = f"{topology.name}: {topology.chips} chips on {topology.hosts} hosts" if chip else topology.name
    lines.append(f"{where}, mesh {' × '.join(f'{k} {v}' for k, v in mesh.items())}")
    if chip:
        low, high = plan["epoch_seconds"]
        hours = plan["device_hours_per_epoch"]
        work = f"{plan['flops_per_epoch'] / 1e15:,.1f} PFLOP"
        lines.append(
            f"GiB on a device, {chip.usable / GIB:.2f} usable. An epoch: {work}, {duration(low)} to "
            f"{duration(high)}, {hours[0]:,.2f} to {hours[1]:,.2f} device-hours"
        )
    return "\n".join(lines)


def largest(one: Phase) -> str:
    """The three largest results of a program, by the name that the program gives them."""
    found = one.found["buffers"][:3]
    return f"{one.name}, largest results: " + "; ".join(
        f"{b['size'] / 2**20:,.0f} MiB {b['shape'][:40]} {b['op_name'][-60:]}" for b in found
    )
