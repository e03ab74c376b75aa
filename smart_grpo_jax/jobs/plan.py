"""`--mode=plan --topology=v5e:4x4`: does this config fit that slice, and what would it cost?

Every program of an epoch is compiled for the slice on this machine, without weights, by the compiler that
the slice itself uses; what it says of memory is an answer and not an estimate. Times are: operations are
counted by us (maths/flops.py), traffic is read from the compiled programs, peaks are published ones.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.contradictions import elite_count
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import microbatch, plan_numbers, plan_picture, plan_slices, plan_text, traced
from smart_grpo_jax.jobs.footprint import Footprint
from smart_grpo_jax.jobs.plan_cache import Cache
from smart_grpo_jax.jobs.plan_numbers import COUNTED, Phase, Plan
from smart_grpo_jax.runtime import aot, topologies
from smart_grpo_jax.runtime.aot import FITS, TOO_LARGE, Outcome
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.progress import Heartbeat, say
from smart_grpo_jax.runtime.topologies import GIB, Topology

CHILD = "smart_grpo_jax.jobs.plan_compile"
PHASES = ("rollout", "update", "evaluate")
QUICK, EXACT = 1800.0, 7200.0
"""Seconds that a compiler may take."""

TRIES = 3
"""How often a phase whose microbatches are solved is compiled, half as large each time."""

AT_ONCE = 2
"""Compilers at a time: each keeps one core busy and takes some GB."""

Ask = Callable[[Config, Topology, str], Outcome]
"""What a program is: ask(config, topology, program)."""


def job(config: Config, name: str, exact: bool = False, out: str = "") -> bool:
    """Plan, print, and write JSON and a picture where they are asked for; True where everything fits."""
    topology = topologies.parse(name)
    plan = planned(config, topology, asker(exact, out))
    found = plan_numbers.summary(plan)
    say(plan_text.text(plan, found))
    if out:
        write_atomic(Path(out), (json.dumps(found, indent=1) + "\n").encode())
        write_atomic(Path(out).with_suffix(".svg"), plan_picture.svg(plan).encode())
    return plan.fits


def asker(exact: bool, out: str) -> Ask:
    """Asks a child process; answers are kept beside `out`, so that a plan that was broken off goes on."""
    cache = Cache(Path(out).with_suffix(".parts") if out else None, exact)

    def ask(config: Config, topology: Topology, program: str) -> Outcome:
        host = topology if compiled_for(topology) else Topology("cpu", "", topology.chips)
        whole = with_search(config)
        request = {
            "config": configs.to_dict(whole),
            "topology": host.name,
            "program": program,
            "compile": compiled_for(topology),
        }
        done = cache.get(request)
        if done is None:
            doing = "counting" if program == "footprint" or not request["compile"] else "compiling"
            with Heartbeat(f"{doing}: {program} for {host.name}"):
                env, asked = aot.environment(host, exact), {**request, "kept": cache.programs}
                done = cache.put(request, aot.child(CHILD, asked, env, EXACT if exact else QUICK))
        never = done.found.get("never", {}) if whole is not config else {}
        return done._replace(found={**{k: v for k, v in done.found.items() if k != "never"}, **never})

    return ask


def with_search(config: Config) -> Config:
    """The config whose programs are this one's. Flow-GRPO is a search that is never taken, and what it costs
    is told beside what the search costs: so one answer serves both."""
    search = dataclasses.replace(config.search, rounds=traced.DEFAULT_ROUNDS)
    never = config.search.rounds == 0 and config.search.credit == "none"
    could = config.sampler.window.kind == "all" and config.sampler.transition != "ode"
    return (
        dataclasses.replace(config, search=search) if never and could and elite_count(search) > 1 else config
    )


def compiled_for(topology: Topology) -> bool:
    """Whether the compiler of the topology is one that runs here; UserError where it is not installed."""
    if topology.chip is None:
        return True
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError('--mode=plan: libtpu is not installed, wanted pip install "smart_grpo_jax[plan]"')
    return topology.chip.platform == "tpu"


def planned(config: Config, topology: Topology, ask: Ask, names: Sequence[str] = PHASES) -> Plan:
    """The recipe: settle what is automatic, compile every phase of `names`, look at other slices."""
    if not compiled_for(topology):
        config = portable(config)
    if config.search.steps == "auto":  # the window is measured when training begins
        config = dataclasses.replace(config, search=dataclasses.replace(config.search, steps="late"))
    solved = tuple(name for name, value in microbatch.numbers_of(config).items() if value < 0)
    asked, footprint, why = config, None, "as given"
    if topology.chip is not None and (microbatch.automatic(config) or not compiled_for(topology)):
        footprint = footprint_of(config, topology, ask)
        if isinstance(footprint, Phase):
            return Plan(topology, (footprint,), {}, why, {})
    limit = topology.chip.usable if topology.chip else None
    config, why = microbatch.settle(config, footprint, topology.chips, limit)
    if footprint is not None and not compiled_for(topology):
        phases, tries = tuple(counted(config, topology, name, footprint, ask) for name in names), 1
    else:
        phases, config, tries = compiled(config, topology, solved, ask, names)
        phases = with_estimates(phases, config, topology, footprint)
    mesh = {"data": topology.chips // (config.mesh.fsdp * config.mesh.tensor)}
    mesh |= {"fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor}
    numbers = microbatch.numbers_of(config)
    plan = Plan(topology, phases, mesh, why, numbers, solved, tries, None, searched_steps(config))
    if not plan.fits and footprint is None and all(p.verdict in (FITS, TOO_LARGE) for p in phases):
        footprint = footprint_of(config, topology, ask) if topology.chip else None
    if isinstance(footprint, Footprint):
        plan = dataclasses.replace(plan, other=plan_slices.other(asked, footprint, topology, plan.fits))
    return plan


def portable(config: Config) -> Config:
    """With the attention that needs as little memory as a card's own kernel and can be counted anywhere."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="chunked"))


def footprint_of(config: Config, topology: Topology, ask: Ask) -> Footprint | Phase:
    """The footprint of a config, counted on the mesh of the topology; the failure where it cannot be."""
    outcome = ask(microbatch.trial(config, topology.chips), topology, "footprint")
    if "footprint" in outcome.found:
        return Footprint.from_dict(outcome.found["footprint"])
    return Phase("footprint", outcome.verdict, {}, outcome.reason)


def counted(config: Config, topology: Topology, name: str, footprint: Footprint, ask: Ask) -> Phase:
    """A phase of a chip whose compiler is not here: its memory by the estimate."""
    done = ask(config, topology, name)
    peaks = plan_slices.estimate(config, footprint, topology)
    peak = peaks["update" if name == "update" else "rollout"]
    assert topology.chip is not None
    limit, reason = topology.chip.usable, done.reason
    if not reason and peak > limit:
        reason = f"about {peak / GIB:.1f} GiB, {limit / GIB:.2f} usable"
    found = {**done.found, "peak_bytes": peak, "resident_bytes": 0.0}
    return Phase(name, COUNTED if done.verdict == FITS else done.verdict, found, reason)


def with_estimates(
    phases: tuple[Phase, ...], config: Config, topology: Topology, footprint: Footprint | None
) -> tuple[Phase, ...]:
    """What the straight lines said beside what the compiler said, so that a plan shows how good they are."""
    if footprint is None:
        return phases
    lines = plan_slices.estimate(config, footprint, topology)
    known = lambda one: {"estimated_bytes": lines[one.name]} if one.name in lines else {}
    return tuple(one._replace(found={**one.found, **known(one)}) for one in phases)


def compiled(
    config: Config, topology: Topology, solved: tuple[str, ...], ask: Ask, names: Sequence[str]
) -> tuple[tuple[Phase, ...], Config, int]:
    """Every phase, AT_ONCE of them together; a solved microbatch that turns out too large is halved."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        first = list(pool.map(lambda name: phase(config, topology, name, ask), names))
    phases: list[Phase] = []
    asked, most = microbatch.numbers_of(config), 1
    ways = topology.chips // config.mesh.tensor
    for name, one in zip(names, first, strict=True):
        ours, tries = microbatch.PHASES[name], 1
        numbers = microbatch.numbers_of(config)
        if any(numbers[n] != asked[n] for n in ours):
            one = phase(config, topology, name, ask)
        while one.verdict == TOO_LARGE and tries < TRIES:
            mine = [n for n in ours if n in solved]
            smaller = microbatch.halved(numbers, mine, config.prompts.groups, ways)
            if smaller == numbers:
                break
            config, numbers, tries = microbatch.with_numbers(config, smaller), smaller, tries + 1
            one = phase(config, topology, name, ask)
        phases.append(one)
        most = max(most, tries)
    return tuple(phases), config, most


def phase(config: Config, topology: Topology, name: str, ask: Ask) -> Phase:
    """One program, compiled in a process of its own."""
    done = ask(config, topology, name)
    made = Phase(name, done.verdict, done.found, done.reason)
    limit = topology.chip.usable if topology.chip else float("inf")
    if made.verdict == FITS and made.total > limit:
        reason = f"{made.total / GIB:.1f} GiB with what else lies there, {limit / GIB:.2f} usable"
        return made._replace(verdict=TOO_LARGE, reason=reason)
    return made
