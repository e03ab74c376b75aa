import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime import distributed

ROOT = Path(__file__).parents[2]
ALL = {"SGRPO_COORDINATOR": "h:1", "SGRPO_PROCESSES": "4", "SGRPO_PROCESS_ID": "3"}


def test_a_single_process_joins_nobody(monkeypatch):
    for name in (*distributed.EXPLICIT, *distributed.SLURM, "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialise()
    assert not jax.distributed.is_initialized()
    assert distributed.is_main()
    assert distributed.from_main(7) == 7
    assert distributed.any_process(True) and not distributed.any_process(False)


def test_a_stopped_run_asks_for_a_restart_where_something_would_start_it(monkeypatch):
    monkeypatch.delenv(distributed.SUPERVISED, raising=False)
    assert not distributed.supervised()
    monkeypatch.setenv(distributed.SUPERVISED, "1")
    assert distributed.supervised()


def test_whoever_watches_hears_of_everything_that_may_wait_for_others():
    told = []
    forget = distributed.before_waiting(lambda: told.append("waits"))
    program = distributed.waits(lambda a, b: told.append("runs") or a + b)
    assert program(1, 2) == 3 and told == ["waits", "runs"]
    distributed.gather(None)
    distributed.whole({"a": jax.numpy.zeros(2)})
    assert told == ["waits", "runs", "waits", "waits"]
    forget()
    program(1, 2)
    assert told[4:] == ["runs"]


def test_explicit_variables_are_read_together_or_refused():
    assert distributed.explicit_arguments({}) is None
    assert distributed.explicit_arguments(ALL) == ("h:1", 4, 3)
    for change, start in [
        ({"SGRPO_PROCESSES": ""}, "SGRPO_PROCESSES: not set"),
        ({"SGRPO_PROCESS_ID": "x"}, "SGRPO_PROCESS_ID: got x"),
        ({"SGRPO_PROCESS_ID": "4"}, "SGRPO_PROCESS_ID: got 4, want less than"),
    ]:
        with pytest.raises(UserError) as error:
            distributed.explicit_arguments(ALL | change)
        assert error.value.line.startswith(start)


def test_slurm_counts_only_inside_a_step_of_several_tasks():
    step = dict.fromkeys(distributed.SLURM, "0")
    assert distributed.in_slurm_step(step | {"SLURM_NTASKS": "2"})
    assert not distributed.in_slurm_step(step | {"SLURM_NTASKS": "1"})
    assert not distributed.in_slurm_step({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"})


@pytest.mark.parametrize(
    ("tasks", "nodes", "local", "visible", "more", "devices"),
    [
        (8, 2, 3, "0,1,2,3", {}, [3]),
        (2, 2, 0, "0,1,2,3", {}, [0, 1, 2, 3]),
        (4, 2, 1, "0,1,2,3", {}, [2, 3]),
        (8, 2, 3, "0", {}, [0]),
        (4, 2, 1, "0,1", {"SLURM_GPUS_PER_TASK": "2"}, [0, 1]),
        (8, 2, 3, "", {}, None),
        (8, 2, 3, "0,1,2,3", {"JAX_LOCAL_DEVICE_IDS": "1"}, None),
    ],
    ids=["one each", "one task per node", "two each", "bound to one", "bound to two", "no gpu", "said"],
)
def test_a_slurm_task_takes_its_share_of_the_gpus(tasks, nodes, local, visible, more, devices):
    env = {"SLURM_NTASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_LOCALID": str(local)}
    assert distributed.slurm_devices(env | {"CUDA_VISIBLE_DEVICES": visible} | more) == devices


def test_gpus_that_cannot_be_shared_evenly_are_refused():
    env = {"SLURM_NTASKS": "3", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    with pytest.raises(UserError, match="got 3 tasks for the 4 GPUs"):
        distributed.slurm_devices(env)


def test_tpu_hosts_of_all_slices_are_counted():
    assert distributed.tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}) == 6
    assert distributed.tpu_hosts({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}) == 2
    assert distributed.tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}) == 2
    assert distributed.tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}) == 1


def test_a_tpu_vm_asks_the_metadata_server_for_hosts_and_slices(monkeypatch):
    answers = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nZONE: 'z'",
    }
    monkeypatch.setattr(distributed.os.path, "exists", lambda path: path == "/dev/vfio/0")
    monkeypatch.setattr(distributed, "metadata", lambda attribute: answers[attribute])
    assert distributed.tpu_hosts({}) == 4
    answers["tpu-env"] = ""
    assert distributed.tpu_hosts({}) == 2
    assert distributed.tpu_hosts({"TPU_SKIP_MDS_QUERY": "1"}) == 1
    answers["worker-network-endpoints"] = ""
    assert distributed.tpu_hosts({}) == 1


def test_tpu_hosts_are_counted_from_their_names():
    assert distributed.tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b,c"}) == 3
    assert distributed.tpu_hosts({"TPU_WORKER_HOSTNAMES": "localhost"}) == 1
    assert distributed.tpu_hosts({"TPU_SKIP_MDS_QUERY": "1"}) == 1


WORKER = """
import sys
from smart_grpo_jax.runtime import distributed
distributed.initialise()
import jax, jax.numpy as jnp
from smart_grpo_jax.runtime import mesh as meshes
from smart_grpo_jax.runtime.checkpoint import Checkpoints, state_hash
from smart_grpo_jax.runtime.metrics import MetricLog
from smart_grpo_jax.runtime.run_folder import RunFolder
me, out = jax.process_index(), sys.argv[1]
mesh = meshes.make_mesh(0, 1, 1)
make = lambda sharding: jax.jit(lambda: jnp.arange(8.0), out_shardings=sharding)()
state = {"all": make(meshes.replicated(mesh)), "part": make(meshes.batch_sharding(mesh))}
with RunFolder.open(out, config={}, command=["x"]) as folder:
    with Checkpoints(folder, keep=2, best_of=None) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
        found = checkpoints.restore(state)
        assert found.epoch == 2 and found.state_hash == state_hash(state) == state_hash(found.state)
        assert found.state["part"].sharding == state["part"].sharding
    with MetricLog(folder, tensorboard=False, resume_epoch=None) as log:
        log.write(1, 1, {"x": 1.0})
assert distributed.is_main() == (me == 0)
assert distributed.from_main(10 + me) == 10
assert distributed.any_process(me == 1) and not distributed.any_process(False)
open(f"{out}/done-{me}", "w").close()
"""


def test_two_processes_agree_and_write_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    env |= {"SGRPO_COORDINATOR": f"127.0.0.1:{port}", "SGRPO_PROCESSES": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env=env | {"SGRPO_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for worker in workers:
            _, err = worker.communicate(timeout=300)
            assert worker.returncode == 0, err[-2000:]
    finally:
        for worker in workers:
            worker.kill()
    assert {"done-0", "done-1", "config.json"} <= {p.name for p in tmp_path.iterdir()}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 1
