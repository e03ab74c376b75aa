"""The child of a plan: `python -m smart_grpo_jax.jobs.plan_compile REQUEST.json RESULT.json` compiles one
program of a config for one topology and writes what the compiler said.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.jobs import footprint, plan_programs
from smart_grpo_jax.runtime import aot, topologies
from smart_grpo_jax.runtime.aot_measure import measure
from smart_grpo_jax.runtime.files import write_atomic


def main(request: str, result: str) -> None:
    """Read, compile, write; the result appears whole or not at all."""
    asked = json.loads(Path(request).read_text())
    config = configs.from_dict(asked["config"])
    topology = topologies.parse(asked["topology"])
    mesh = aot.mesh_of(topology, config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    paper = plan_programs.paper(config, mesh)
    if asked["program"] == "footprint":
        counted = {"mesh": dict(mesh.shape), "footprint": footprint.of(paper).as_dict()}
        write_atomic(result, json.dumps(counted))
        return
    program = plan_programs.PROGRAMS[asked["program"]](paper)
    found: dict[str, Any] = {
        "mesh": dict(mesh.shape),
        "times": program.times,
        "share": program.share,
        "flops": program.operations(),
        "resident_bytes": on_a_device(program.resident),
        "images": program.images or paper.images,
        "state_bytes": whole(paper.state),
    }
    if program.often is not None:
        found["never"] = {"flops": program.operations(0.0)}
    aot.counted(result).write_text(json.dumps(found))  # what is known whatever the compiler does
    if asked["compile"]:
        platform = "cpu" if topology.kind == "cpu" else "tpu"
        kept = Path(asked["kept"]) if asked.get("kept") else None
        made = measure(program.jitted(), program.args, mesh, platform, program.often, kept)
        found = {**found, **made, "never": {**found.get("never", {}), **made.get("never", {})}}
    write_atomic(result, json.dumps(found))


def on_a_device(tree: Any) -> float:
    """Bytes of the leaves' parts on one device."""
    total = 0.0
    for leaf in footprint.distinct(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def whole(tree: Any) -> float:
    """Bytes of a tree on all devices together, each part once."""
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


if __name__ == "__main__":
    main(*sys.argv[1:])
