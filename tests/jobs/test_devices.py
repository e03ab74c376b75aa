"""The number of devices changes the speed of a run and nothing else."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

PROBE = """
import hashlib, json, sys
import jax, numpy as np
from smart_grpo_jax import main
from smart_grpo_jax.jobs import train

seen = []
act = train.act

def spy(loop, programs):
    acted, masks, batch = act(loop, programs)
    digest = lambda a: hashlib.sha256(np.asarray(a).tobytes()).hexdigest()
    groups = int(masks.real.sum())  # what fills the mesh comes last
    images = groups * acted.reward.shape[0] // len(masks.real)
    seen.append([digest(batch.prompt_id[:groups]), digest(acted.x[0][:images]), images])
    return acted, masks, batch

train.act = spy
train.evaluation_due = lambda config, epoch: False  # one program less to compile, three times
train.record.finish = lambda *arguments: None
code = main.main(sys.argv[1:])
print(json.dumps({"code": code, "devices": jax.device_count(), "seen": seen}))
"""

# Nine images: with two and with four devices groups must be added and taken away again.
OVERRIDES = (
    "train.epochs=3", "prompts.groups=3", "prompts.members=3", "train.updates_per_epoch=3", "eval.every=0",
    "eval.prompts=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What happened with so many devices; each number is run once, when it is first asked for."""
    folder = tmp_path_factory.mktemp("devices")

    @functools.cache
    def run(devices):
        path = folder / str(devices)
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *tiny_run.command(path, *OVERRIDES)],
            env=tiny_run.environment(JAX_NUM_CPU_DEVICES=str(devices)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert (told["code"], told["devices"]) == (0, devices), done.stderr
        return told["seen"], tiny_run.read(path)

    return run


pytestmark = pytest.mark.slow  # every number of devices compiles its own programs
DEVICES = pytest.mark.parametrize("devices", [2, 4])


@DEVICES
def test_prompts_and_noise_are_the_same_to_the_bit(runs, devices):
    assert runs(devices)[0] == runs(1)[0]
    assert [images for *_, images in runs(1)[0]] == [9, 9, 9]


@DEVICES
def test_what_is_learned_is_the_same(runs, devices):
    ours, theirs = ([row["train/reward"] for row in runs(n)[1][1:]] for n in (1, devices))
    assert len(set(ours)) == 3
    # other batch sizes per device round otherwise, a last bit per layer and step
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    costs = [[row["nfe/velocity"] for row in runs(n)[1]] for n in (1, devices)]
    assert costs[0] == costs[1]


LAID = """
import json, sys
import jax
from smart_grpo_jax import main
from smart_grpo_jax.jobs import assemble, plan_programs
from smart_grpo_jax.flags import parse

config = main.load_config(parse(sys.argv[1:], main.MODES))
run = assemble.assemble(config, training=False)
specs = lambda tree: [str(leaf.sharding.spec) for leaf in jax.tree.leaves(tree)]
planned = plan_programs.paper(config, run.mesh).frozen
print(json.dumps([specs(run.frozen["params"]), specs(planned["params"])]))
"""


def test_frozen_parameters_lie_where_the_tables_and_the_plan_say(tmp_path):
    """They were once read onto their shards and then copied to every device again."""
    mesh = ("mesh.fsdp=2", "mesh.tensor=2")
    done = subprocess.run(
        [sys.executable, "-c", LAID, *tiny_run.command(tmp_path / "r", *OVERRIDES, *mesh)],
        env=tiny_run.environment(JAX_NUM_CPU_DEVICES="4"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    real, planned = json.loads(done.stdout.splitlines()[-1])
    assert real == planned
    assert sum("fsdp" in spec for spec in real) > 10 and any("tensor" in spec for spec in real)
