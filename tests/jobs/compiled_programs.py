"""A child of test_hlo_promises.py: compiles one program of the tiny run for eight CPU devices and says what
it found as JSON.

    python -m tests.jobs.compiled_programs PROGRAM NAME=VALUE …
"""

import json
import sys
import tempfile
from pathlib import Path

import jax

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.jobs import plan_programs
from smart_grpo_jax.main import run_file
from smart_grpo_jax.runtime import hlo
from smart_grpo_jax.runtime.mesh import make_mesh
from tests.jobs import tiny_run


def tiny(changes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.py"
        path.write_text(tiny_run.CONFIG.replace("{model}", str(tiny_run.one_layer())))
        values = run_file(str(path))
    for change in changes:
        configs.override(values, *change.split("=", 1))
    return configs.from_dict(values)


def main(name, *changes):
    config = tiny(changes)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    paper = plan_programs.paper(config, mesh)
    program = plan_programs.PROGRAMS[name](paper)
    compiled = program.jitted().trace(*program.args).lower().compile()
    memory = compiled.memory_analysis()
    local = lambda tree: sum(
        a.dtype.itemsize * jax.numpy.zeros(a.sharding.shard_shape(a.shape), bool).size
        for a in jax.tree.leaves(tree)
    )
    found = {
        "collectives": [
            one._asdict() for one in hlo.collectives(hlo.parse(compiled.as_text()), dict(mesh.shape))
        ],
        "donated": memory.alias_size_in_bytes,
        "state": local(paper.state),
        "weights": sorted({tuple(a.shape) for a in jax.tree.leaves(paper.frozen["params"])}),
        "trained": sorted({tuple(a.shape) for a in jax.tree.leaves(paper.state.params)}),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
