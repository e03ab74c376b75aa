"""What a plan knows, as data: verdicts, bytes, operations, intervals of time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from smart_grpo_jax.runtime.aot import FITS
from smart_grpo_jax.runtime.topologies import GIB, Topology

COUNTED = "counted, not compiled"

LOW = 0.25
"""The lower utilisation of the interval: where XLA's attention left an SD3-sized network (25 to 35 %)."""


class Phase(NamedTuple):
    """What is known of one program: its verdict, what was measured, and the reason where it does not fit."""

    name: str
    verdict: str
    found: Mapping[str, Any]
    reason: str

    @property
    def beside(self) -> float:
        """Bytes on a device that are not the program's: parameters of other phases, earlier calls' images."""
        earlier = max(0.0, self.found.get("times", 1) - 1) * self.found.get("output_bytes", 0.0)
        return self.found.get("resident_bytes", 0.0) + (earlier if self.name == "rollout" else 0.0)

    @property
    def total(self) -> float:
        """Bytes on a device while it runs: its own peak, and what else lies there."""
        return self.found.get("peak_bytes", 0.0) + self.beside

    @property
    def flops(self) -> float:
        """Operations of all its calls, on all devices."""
        return self.found.get("times", 0) * self.found.get("flops", 0.0)

    @property
    def share(self) -> float:
        """How often it runs in an epoch: evaluations come every so many."""
        return self.found.get("share", 1.0)


class Slice(NamedTuple):
    """Another slice that was looked at without compiling for it."""

    name: str
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer for one config and one topology. `numbers` are the microbatches, `solved` those that were
    not given."""

    topology: Topology
    phases: tuple[Phase, ...]
    mesh: Mapping[str, int]
    why: str
    numbers: Mapping[str, int]
    solved: tuple[str, ...] = ()
    tries: int = 1
    other: Slice | None = None
    searched: bool = True

    @property
    def fits(self) -> bool:
        """Every phase fits, by the compiler or, where nothing is compiled, by the estimate."""
        return all(p.verdict == FITS or (p.verdict == COUNTED and not p.reason) for p in self.phases)

    @property
    def tightest(self) -> Phase:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda p: p.total)


def traffic(topology: Topology, sent: Mapping[str, float]) -> tuple[float, float]:
    """Seconds that the links need: all within the slice, or the data axis between slices."""
    chip = topology.chip
    if chip is None:
        return 0.0, 0.0
    total = sum(sent.values())
    far = (
        sum(size for axes, size in sent.items() if "data" in axes.split("+")) if topology.slices > 1 else 0.0
    )
    return total / chip.ici, (total - far) / chip.ici + far / (chip.dcn / chip.chips_per_host)


def seconds(topology: Topology, one: Phase) -> tuple[float, float]:
    """The interval of a phase's time; (0, 0) where there is nothing to tell it from.

    low  = max(F / peak, S / links)                    every unit busy, and traffic hidden behind it
    high = max(F / (LOW × peak), M / bandwidth) + S / links          nothing hidden behind anything
    """
    chip, found = topology.chip, one.found
    if chip is None or "flops" not in found:
        return 0.0, 0.0
    times = found["times"]
    compute = one.flops / topology.chips / chip.flops
    memory = times * found.get("memory_bytes", 0.0) / chip.bandwidth
    near, far = traffic(topology, found.get("sent_bytes", {}))
    return max(compute, times * near), max(compute / LOW, memory) + times * far


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    topology, phases = plan.topology, plan.phases
    spans = [seconds(topology, one) for one in phases]
    low, high = (sum(p.share * span[i] for p, span in zip(phases, spans, strict=True)) for i in (0, 1))
    flops = sum(p.share * p.flops for p in phases)
    images = next((p.found["images"] for p in phases if "images" in p.found), 0)
    chip = topology.chip
    timed = chip is not None and high > 0
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "hosts": topology.hosts,
        "fits": plan.fits,
        "limit_bytes": chip.usable if chip else None,
        "mesh": dict(plan.mesh),
        "why": plan.why,
        "microbatches": dict(plan.numbers),
        "solved": list(plan.solved),
        "tries": plan.tries,
        "other_slice": plan.other._asdict() if plan.other else None,
        "flops_per_epoch": flops,
        "flops_per_image": flops / images if images else 0.0,
        "epoch_seconds": [low, high] if timed else None,
        "images_per_second": [images / high, images / low] if timed else None,
        "device_hours_per_epoch": [topology.chips * s / 3600 for s in (low, high)] if timed else None,
        "saved_bytes": max((p.found.get("state_bytes", 0.0) for p in phases), default=0.0),
        "phases": {
            p.name: {"verdict": p.verdict, "reason": p.reason, "total_bytes": p.total, **p.found}
            | ({"seconds": list(span)} if chip else {})
            for p, span in zip(phases, spans, strict=True)
        },
    }


def sent_per_device(phases: Sequence[Phase]) -> float:
    """Bytes that a device sends in an epoch."""
    return sum(
        p.share * p.found.get("times", 0) * sum(p.found.get("sent_bytes", {}).values()) for p in phases
    )


def gib(value: float | None) -> str:
    """Bytes for a table of GiB; what is very little has a unit of its own."""
    if value is None:
        return ""
    return f"{value / GIB:.2f}" if value >= GIB / 100 or not value else f"{value / 2**20:.1f} MiB"
