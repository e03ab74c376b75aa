"""What a plan says of memory against what a run takes: `python benchmarks/plan_against_truth.py`.

A plan's peak is the compiler's word. Here the same program, with arguments of the same shapes, is run on this
CPU in a process of its own, and the kernel says how much memory it held at most (VmHWM) above what it held
before its arguments were made. Every case is large enough that what is not the program's (threads, the
libraries' packed matrices) is small beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.jobs import plan, plan_programs, traced
from smart_grpo_jax.runtime import aot, aot_measure, compile_cache, topologies
from smart_grpo_jax.runtime.progress import say, table

LIMIT = 1800.0
TOLERANCE = 0.10
"""How far prediction and truth may lie apart."""

COMMON = {
    "prompts.cache": "off", "prompts.groups": 32, "prompts.members": 16, "sampler.steps": 4,
    "search.rounds": 2, "search.candidates": 4, "search.elite": 0.5, "search.steps": [1],
    "sampler.guidance": 3.0, "train.loss": "ppo", "train.updates_per_epoch": 2,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "update": ("update", {}),
    "update, recomputed": ("update", {"memory.remat": "full", "prompts.groups": 64}),
    "update, all weights": ("update", {"adapter.kind": "full"}),
    "rollout": ("rollout", {}),
    "rollout, decoded in pieces": ("rollout", {"memory.decode": 256, "search.chunk": 128}),
    "the network alone": ("network", {}),
}
"""Name → program, changes of COMMON."""


def network(p: plan_programs.Paper) -> plan_programs.Program:
    """The largest call of a rollout: the guided network on the candidates of all searched states."""
    rows = p.groups * p.shape.members * p.config.search.candidates
    x, t = (
        plan_programs.on_paper(jax.ShapeDtypeStruct(shape, np.float32), p.everywhere)
        for shape in ((rows, *p.shape.latent), (rows,))
    )
    args = (p.policy.bind(p.frozen, p.state.params), x, t, p.conditioning(rows))
    return plan_programs.Program(p.fns.velocity, args, 1, {})


PROGRAMS = {**plan_programs.PROGRAMS, "network": network}
"""The plan's phases, and what shows where a difference comes from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table; 1 where a prediction is further off than TOLERANCE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="shapes", help="a diffusers folder, or shapes")
    parser.add_argument("--case", default="", help=", ".join(CASES))
    parser.add_argument("--json", default="", help="a file for the numbers")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    compile_cache.enable()
    if arguments.measure:
        measure(*map(Path, arguments.measure))
        return 0
    wanted = [arguments.case] if arguments.case else list(CASES)
    found = {case: compare(case, arguments.model) for case in wanted}
    say(text(found))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return int(any(abs(one["off"]) > TOLERANCE for one in found.values()))


def config_of(case: str, model: str) -> Config:
    """The config of a case."""
    values = configs.default()
    for name, value in {"model.path": model, **COMMON, **CASES[case][1]}.items():
        configs.override(values, name, json.dumps(value) if isinstance(value, list) else str(value))
    return configs.from_dict(values)


def compare(case: str, model: str) -> dict[str, float]:
    """Bytes: predicted by the plan's own child where the program is a phase, and measured."""
    program, here = CASES[case][0], topologies.parse("cpu:1")
    request = {
        "config": configs.to_dict(config_of(case, model)),
        "topology": here.name,
        "program": program,
        "compile": True,
    }
    found = truth(request)
    planned = found["planned"]
    if program in plan_programs.PROGRAMS:
        child = aot.child(plan.CHILD, request, aot.environment(here, exact=False), LIMIT)
        if child.verdict != aot.FITS:
            raise SystemExit(f"{case}: {child.verdict}: {child.reason}")
        planned = child.found
    return {
        "predicted": planned["peak_bytes"],
        "arguments": planned["argument_bytes"],
        "temporary": planned["temp_bytes"],
        "measured": found["peak_bytes"],
        "off": planned["peak_bytes"] / found["peak_bytes"] - 1,
    }


def truth(request: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    env = aot.environment(topologies.parse(request["topology"]), exact=False)
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(request))
        command = [sys.executable, __file__, "--measure", str(asked), str(answer)]
        subprocess.run(command, env=env, check=True, timeout=LIMIT)
        return json.loads(answer.read_text())


def measure(asked: Path, answer: Path) -> None:
    """Run one program on arguments that are made for it, and write what the kernel says of the memory."""
    request = json.loads(asked.read_text())
    config = configs.from_dict(request["config"])
    mesh = aot.mesh_of(topologies.parse(request["topology"]), *(getattr(config.mesh, n) for n in AXES))
    paper = plan_programs.paper(config, mesh)
    program = PROGRAMS[request["program"]](paper)
    compiled = program.jitted().lower(*program.args).compile()
    knobs = known(paper, request["program"])
    run = lambda: jax.block_until_ready(compiled(*real(program.args, knobs)))
    run()  # threads, libraries and small programs come once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again here
    before = status("VmRSS")
    run()
    peak, planned = status("VmHWM") - before, aot_measure.memory_of(compiled)
    answer.write_text(json.dumps({"peak_bytes": peak, "before": before, "planned": planned}))


AXES = ("data", "fsdp", "tensor")


def known(paper: plan_programs.Paper, program: str) -> PyTree:
    """The knobs as training has them: which steps are searched decides what is run."""
    make = traced.rollout_knobs if program == "rollout" else traced.update_knobs
    return make(paper.config, paper.times, 0)


def real(shapes: tuple[PyTree, ...], knobs: PyTree) -> tuple[PyTree, ...]:
    """Arrays of these shapes, every page written: small random numbers, zeros where they count something."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, np.floating):
            values = rng.standard_normal(leaf.shape, np.float32) * 0.05
        else:
            values = np.full(leaf.shape, leaf.dtype == bool)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return tuple(knobs if isinstance(one, type(knobs)) else jax.tree.map(fill, one) for one in shapes)


def status(field: str) -> float:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * float(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def text(found: dict[str, dict[str, float]]) -> str:
    """The table, in MiB."""
    mib = lambda value: f"{value / 2**20:,.0f}"
    rows = [
        [
            case,
            *(mib(one[n]) for n in ("arguments", "temporary", "predicted", "measured")),
            f"{one['off']:+.1%}",
        ]
        for case, one in found.items()
    ]
    head = ["program", "arguments, MiB", "temporary", "predicted peak", "measured peak", "off"]
    return f"{table(rows, head)}\non {os.cpu_count()} cores, jax {jax.__version__}"


if __name__ == "__main__":
    sys.exit(main())
