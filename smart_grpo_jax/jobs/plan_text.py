"""A plan for a person: one line per program, then what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smart_grpo_jax.jobs import microbatch
from smart_grpo_jax.jobs.plan_numbers import COUNTED, Phase, Plan, gib, seconds
from smart_grpo_jax.runtime.progress import duration, table
from smart_grpo_jax.runtime.topologies import GIB, Topology

HEAD = ("phase", "verdict", "arguments", "temporary", "peak", "beside it", "total", "PFLOP", "seconds")
BYTES = ("argument_bytes", "temp_bytes", "peak_bytes")


def text(plan: Plan, found: Mapping[str, Any]) -> str:
    """The whole answer; `found` is the plan's summary."""
    lines = [table([row(plan.topology, one) for one in plan.phases], HEAD)]
    lines += [f"{p.name}: {p.reason}" for p in plan.phases if p.reason]
    lines += [largest(one) for one in plan.phases if one.found.get("buffers")]
    lines += [sent(one) for one in plan.phases if "sent_bytes" in one.found]
    if found["saved_bytes"]:
        lines.append(f"save: {found['saved_bytes'] / GIB:.2f} GiB are written per checkpoint")
    lines += [verdict(plan), mesh(plan), at_once(plan), *other(plan), *cost(plan.topology, found)]
    return "\n".join(lines)


def row(topology: Topology, one: Phase) -> list[str]:
    """A program's line."""
    span = seconds(topology, one)
    return [
        one.name,
        one.verdict,
        *(gib(one.found.get(key)) for key in BYTES),
        gib(one.beside) if one.total else "",
        gib(one.total) if one.total else "",
        f"{one.flops / 1e15:,.1f}" if "flops" in one.found else "",
        f"{span[0]:,.0f} … {span[1]:,.0f}" if span[1] else "",
    ]


def largest(one: Phase) -> str:
    """The three largest results of a program, by the name that the program gives them."""
    found = one.found["buffers"][:3]
    return f"{one.name}, largest results: " + "; ".join(
        f"{b['size'] / 2**20:,.0f} MiB {b['shape'][:40]} {b['op_name'][-60:]}" for b in found
    )


def sent(one: Phase) -> str:
    """What a device sends over each axis and moves to and from its memory, in all calls of the phase."""
    times, axes = one.found["times"], one.found["sent_bytes"]
    each = ", ".join(f"{axis} {times * size / GIB:,.2f}" for axis, size in sorted(axes.items()))
    memory = times * one.found.get("memory_bytes", 0.0) / GIB
    return f"{one.name}, GiB that a device sends: {each or 'none'}; moves to and from memory: {memory:,.0f}"


def verdict(plan: Plan) -> str:
    """The answer in one line."""
    said = "yes" if plan.fits else "no"
    chip, tightest = plan.topology.chip, plan.tightest
    bad = [p for p in plan.phases if p.verdict not in ("fits", COUNTED) or p.reason]
    how = " (an estimate: nothing was compiled)" if any(p.verdict == COUNTED for p in plan.phases) else ""
    if bad and not plan.fits:
        return f"fits: {said}{how}; {bad[0].name}: {bad[0].verdict}"
    if chip is None:
        return f"fits: {said}{how}; {tightest.name} takes {tightest.total / GIB:.2f} GiB of each device"
    return (
        f"fits: {said}{how}; {tightest.name} takes {tightest.total / GIB:.2f} of {chip.usable / GIB:.2f} GiB "
        f"on each device"
    )


def mesh(plan: Plan) -> str:
    """Devices, and how they are used."""
    t = plan.topology
    where = f"{t.name}: {t.chips} chips on {t.hosts} hosts" if t.chip else t.name
    return f"{where}, mesh {' × '.join(f'{k} {v}' for k, v in plan.mesh.items())} ({plan.why})"


def at_once(plan: Plan) -> str:
    """The microbatches, and which of them are ours."""
    if not plan.numbers:
        return "at once: not known"
    names = ", ".join(plan.solved)
    whose = f"solved: {names}; {plan.tries} tries" if plan.solved else "as given"
    return f"at once: {microbatch.words(plan.numbers, plan.searched)} ({whose})"


def other(plan: Plan) -> list[str]:
    """The next slice down that would do, or up."""
    if plan.other is None:
        return []
    kind = "smallest slice that would fit" if plan.fits else "slice that would fit"
    return [f"{kind}: {plan.other.name} (an estimate)" if plan.other.fits else f"{kind}: none that is sold"]


def cost(topology: Topology, found: Mapping[str, Any]) -> list[str]:
    """An epoch: work, time, device-hours, images per second."""
    whole, each = found["flops_per_epoch"] / 1e15, found["flops_per_image"] / 1e12
    work = f"{whole:,.1f} PFLOP, {each:,.1f} TFLOP an image"
    if not found["epoch_seconds"]:
        return [f"an epoch: {work}"]
    low, high = found["epoch_seconds"]
    hours, rate = found["device_hours_per_epoch"], found["images_per_second"]
    return [
        f"an epoch: {work}; {duration(low)} to {duration(high)}, {hours[0]:,.2f} to {hours[1]:,.2f} "
        f"device-hours, {rate[0]:,.2f} to {rate[1]:,.2f} images/s"
    ]
