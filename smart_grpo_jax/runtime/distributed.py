"""One program, one or many processes: when to join the others, and how to agree with them."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from smart_grpo_jax.core.errors import UserError

EXPLICIT = ("SGRPO_COORDINATOR", "SGRPO_PROCESSES", "SGRPO_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
METADATA_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def initialise() -> None:
    """Joins the other processes of a multi-process job; does nothing in a single process.

    Three environments count: the explicit variables SGRPO_COORDINATOR (host:port), SGRPO_PROCESSES and
    SGRPO_PROCESS_ID, as launch/local.py sets them; a SLURM step of several tasks; Cloud TPU slices with
    several hosts in all, as TPU VMs or in GKE.
    """
    if jax.distributed.is_initialized():
        return
    explicit = explicit_arguments(os.environ)
    if explicit is not None:
        # What is said explicitly holds, even inside a cluster that jax would recognise.
        jax.distributed.initialize(*explicit, cluster_detection_method="deactivate")
    elif in_slurm_step(os.environ):
        jax.distributed.initialize(local_device_ids=slurm_devices(os.environ))
    elif tpu_hosts(os.environ) > 1:
        jax.distributed.initialize()


def explicit_arguments(env: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator, number of processes, own index) from the SGRPO variables; None without them."""
    given = [name for name in EXPLICIT if env.get(name)]
    if not given:
        return None
    if missing := [name for name in EXPLICIT if name not in given]:
        raise UserError(f"{missing[0]}: not set, but {given[0]} is; a multi-process run needs all three")
    numbers = []
    for name in EXPLICIT[1:]:
        if not env[name].isdigit():
            raise UserError(f"{name}: got {env[name]}, want a whole number")
        numbers.append(int(env[name]))
    processes, index = numbers
    if index >= processes:
        raise UserError(f"SGRPO_PROCESS_ID: got {index}, want less than SGRPO_PROCESSES = {processes}")
    return env["SGRPO_COORDINATOR"], processes, index


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that `srun` started."""
    return all(name in env for name in SLURM) and int(env.get("SLURM_NTASKS", "1")) > 1


def slurm_devices(env: Mapping[str, str]) -> list[int] | None:
    """The share of this task in the GPUs that it sees; None leaves the choice to jax.

    By itself jax takes one GPU per task, the one with the task's local number. That wastes the others
    where there is one task per node, and there is no such number where SLURM bound each task to its own.
    """
    visible = len([gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()])
    if not visible or env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    tasks = int(env["SLURM_NTASKS"]) // int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if visible < tasks or "SLURM_GPUS_PER_TASK" in env:
        return list(range(visible))
    if visible % tasks:
        raise UserError(f"SLURM_NTASKS: got {tasks} tasks for the {visible} GPUs of a node, want a divisor")
    share = visible // tasks
    first = int(env["SLURM_LOCALID"]) * share
    return list(range(first, first + share))


def tpu_hosts(env: Mapping[str, str]) -> int:
    """How many hosts the TPU slices of this job have; 1 where there is no TPU, or one host alone.

    GKE names the hosts of a slice in TPU_WORKER_HOSTNAMES and the number of slices in
    MEGASCALE_NUM_SLICES; on a plain TPU VM only the metadata server knows them, and it is asked only
    where a TPU is plugged in.
    """
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu").split(","):
        return 1
    slices = env.get("MEGASCALE_NUM_SLICES")
    named = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if not named:
        plugged = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
        if not plugged or "TPU_SKIP_MDS_QUERY" in env:
            return 1
        named = metadata("worker-network-endpoints")
        slices = slices or tpu_env(metadata("tpu-env")).get("MEGASCALE_NUM_SLICES")
    hosts = len([host for host in named.split(",") if host])
    return max(1, hosts) * int(slices or 1)


def metadata(attribute: str) -> str:
    """What the metadata server of a Google Cloud machine says; nothing where there is none."""
    request = urllib.request.Request(METADATA_URL + attribute, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3.0) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def tpu_env(text: str) -> dict[str, str]:
    """The attribute `tpu-env`: lines of the form NAME: 'value'."""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip().strip("'") for name, _, value in pairs}


def is_main() -> bool:
    """Whether this is the process that writes logs, pictures and manifests."""
    return jax.process_index() == 0


def from_main(value: int) -> int:
    """The main process's value, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process; every process must ask at the same place.

    A preemption reaches the hosts at different moments: they must agree before one of them leaves.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))
