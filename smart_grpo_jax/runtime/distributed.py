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
TPU_HOSTS_URL = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
)


def initialise() -> None:
    """Joins the other processes of a multi-process job; does nothing in a single process.

    Three environments count: the explicit variables SGRPO_COORDINATOR (host:port), SGRPO_PROCESSES and
    SGRPO_PROCESS_ID; a SLURM step of several tasks; a Cloud TPU slice of several hosts.
    """
    if jax.distributed.is_initialized():
        return
    explicit = explicit_arguments(os.environ)
    if explicit is not None:
        jax.distributed.initialize(*explicit)
    elif in_slurm_step(os.environ) or tpu_hosts(os.environ) > 1:
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


def tpu_hosts(env: Mapping[str, str]) -> int:
    """How many hosts the TPU slice of this machine has; 1 where there is no TPU or no slice.

    GKE names the hosts in TPU_WORKER_HOSTNAMES; on a plain TPU VM only the metadata server knows them,
    and it is asked only where a TPU is plugged in.
    """
    named = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if named:
        return len([host for host in named.split(",") if host])
    plugged = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    if not plugged or "TPU_SKIP_MDS_QUERY" in env or env.get("JAX_PLATFORMS", "tpu") != "tpu":
        return 1
    request = urllib.request.Request(TPU_HOSTS_URL, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3.0) as reply:
            return max(1, len([host for host in reply.read().decode().split(",") if host]))
    except OSError:
        return 1


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
