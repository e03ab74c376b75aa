"""The child of a plan: `python -m smart_grpo_jax.jobs.plan_compile REQUEST.json RESULT.json` compiles one
program of a config for one topology and writes what the compiler said.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.jobs import plan_programs
from smart_grpo_jax.jobs.plan_programs import Paper, Program
from smart_grpo_jax.jobs.traced import epoch_window, search_mask
from smart_grpo_jax.maths import flops
from smart_grpo_jax.runtime import aot, topologies


def main(request: str, result: str) -> None:
    """Read, compile, write; the result appears whole or not at all."""
    asked = json.loads(Path(request).read_text())
    config = configs.from_dict(asked["config"])
    topology = topologies.parse(asked["topology"])
    mesh = aot.mesh_of(topology, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    paper = plan_programs.paper(config, mesh)
    program = plan_programs.PROGRAMS[asked["program"]](paper)
    found: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "times": program.times,
        "flops": operations(paper, program, asked["program"]),
        "resident_bytes": on_a_device(program.resident),
        "images": config.prompts.groups * config.prompts.members,
    }
    aot.counted(result).write_text(json.dumps(found))  # what is known whatever the compiler does
    if asked["compile"]:
        platform = "cpu" if topology.kind == "cpu" else "tpu"
        found |= aot.measure(program.jitted(), program.args, mesh, platform)
    temporary = Path(f"{result}.tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(result)


def operations(paper: Paper, program: Program, name: str) -> float:
    """FLOPs of one run of the program on all devices.

    The counter takes the costlier branch of a conditional, so that every step would be searched; only the
    searched ones are.
    """
    whole = flops.count(program.fn, *program.args)
    if name != "rollout" or not paper.shape.searched_members:
        return whole
    plain = dataclasses.replace(paper, shape=dataclasses.replace(paper.shape, searched_members=0))
    base = plan_programs.PROGRAMS[name](plain)
    without = flops.count(base.fn, *base.args)
    mask = search_mask(paper.config, paper.times, epoch_window(paper.config, 0).stochastic)
    return without + (whole - without) * float(mask[: paper.shape.stop].mean())


def on_a_device(tree: Any) -> float:
    """Bytes of the leaves' parts on one device."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        size = 1
        for side in shape:
            size *= side
        total += size * leaf.dtype.itemsize
    return total


if __name__ == "__main__":
    main(*sys.argv[1:])
