"""One program, one or many processes: when to join the others, and how to agree with them."""

from __future__ import annotations

import itertools
import json
import os
import types
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax._src import clusters, compiler
from jax._src import distributed as coordination
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.runtime import progress
from smart_grpo_jax.runtime.relay import Relay

P = ParamSpec("P")
T = TypeVar("T")
EXPLICIT = ("SGRPO_COORDINATOR", "SGRPO_PROCESSES", "SGRPO_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
METADATA_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


JOIN_SECONDS = 300
"""How long the processes of a job may take to find each other."""

SILENT_SECONDS = 600
"""After which jax itself gives a process up; the watchdog, which can say why, must be quicker."""

FOR_EVER = 2**31 - 1
"""Milliseconds: whoever waits for others is ended by the watchdog, not by a time-out of jax."""

SUPERVISED = "SGRPO_SUPERVISED"
"""Set where something starts the program again after exit code 75 (launch/)."""


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
        join(*explicit, None)
    elif in_slurm_step(os.environ):
        join(*recognised(slurm_devices(os.environ)))
    elif tpu_hosts(os.environ) > 1:
        join(*recognised(None))


def recognised(local: list[int] | None) -> tuple[str, int, int, Sequence[int] | None]:
    """(coordinator, processes, own index, own devices) as jax reads them from a cluster's environment."""
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    coordinator, processes, index, found = detect(None, None, None, local, None, JOIN_SECONDS)
    if coordinator is None or processes is None or index is None:
        raise UserError("processes: got an environment of many hosts that jax does not know, wanted SGRPO_*")
    return coordinator, processes, index, found


def join(coordinator: str, processes: int, index: int, local: Sequence[int] | None) -> None:
    """Meets the others at process 0, and leaves the word to it."""
    progress.speak(index == 0)
    if index:
        _keep_programs()
    _joined["host"] = coordinator.rpartition(":")[0].strip("[]")
    # Ours is the handler of SIGTERM: a stop is agreed on between phases, wherever the signal came.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator if index == 0 else Relay(coordinator, JOIN_SECONDS).address,
        processes,
        index,
        local_device_ids=local,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=SILENT_SECONDS,
    )


def _keep_programs() -> None:
    """Lets this process, too, write what it compiles into the compilation cache.

    jax leaves that to process 0. But on CPUs the entries of two processes differ, and on a pod each host has
    the folder on a disk of its own: the others would compile everything again after each restart.
    """
    write = getattr(compiler, "_cache_write", None)
    if isinstance(write, types.FunctionType) and "distributed" in write.__globals__:
        first = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0))
        names = {**write.__globals__, "distributed": first}
        compiler._cache_write = types.FunctionType(write.__code__, names)


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


def supervised() -> bool:
    """Whether something outside starts the program again when it asks for it with exit code 75."""
    return jax.process_count() > 1 or bool(os.environ.get(SUPERVISED))


def coordinator_host() -> str:
    """The machine of process 0, as its coordination service is reached."""
    return _joined.get("host", "127.0.0.1")


def publish(key: str, value: str) -> None:
    """A word of this process that the others may read."""
    client = coordination.global_state.client
    assert client is not None
    client.key_value_set(key, value)


def published(key: str) -> str:
    """The word that another process published, as soon as it is there."""
    client = coordination.global_state.client
    assert client is not None
    return client.blocking_key_value_get(key, JOIN_SECONDS * 1000)


_before_waiting: list[Callable[[], None]] = []


def before_waiting(call: Callable[[], None]) -> Callable[[], None]:
    """`call` is made from here on whenever the main thread may wait for other processes: the watchdog learns
    from it who stands in front of a collective and who has not come so far. Returns what ends this."""
    _before_waiting.append(call)
    return lambda: _before_waiting.remove(call)


def waits(program: Callable[P, T]) -> Callable[P, T]:
    """A program over the devices of all processes: whoever calls it may wait for the others in it."""

    @wraps(program)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        _waiting()
        return program(*args, **kwargs)

    return called


def _waiting() -> None:
    for call in _before_waiting:
        call()


_joined: dict[str, str] = {}
_turns = itertools.count()


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes by rank; every process must ask at the same place.

    Over the coordination service, so that nothing is compiled and the devices are left alone. NaN passes.
    """
    _waiting()
    count = jax.process_count()
    if count == 1:
        return [value]
    turn, rank, client = next(_turns), jax.process_index(), coordination.global_state.client
    assert client is not None
    folder = f"sgrpo/gather/{turn}"
    client.key_value_set(f"{folder}/{rank}", json.dumps(value))
    client.wait_at_barrier(folder, FOR_EVER)
    found = {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(folder)}
    if turn:  # everybody has read the turn before this one
        client.key_value_delete(f"sgrpo/gather/{turn - 1}/{rank}")
    return [json.loads(found[str(other)]) for other in range(count)]


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    return gather(value if is_main() else None)[0]


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process; every process must ask at the same place.

    A preemption reaches the hosts at different moments: they must agree before one of them leaves.
    """
    return any(gather(bool(flag)))


def meet(mesh: Mesh) -> None:
    """Connects the processes along the axes of the mesh, while none of them is compiling.

    On CPUs the first collective of a group waits 30 s for its members and then gives up.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    gather(None)
    axes = [name for name, size in mesh.shape.items() if size > 1]
    spec = PartitionSpec(mesh.axis_names)
    ones = place(np.ones(mesh.size, np.float32), NamedSharding(mesh, spec))
    for count in range(1, len(axes) + 1):
        for group in itertools.combinations(axes, count):
            total = partial(jax.lax.psum, axis_name=group)
            mapped = jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
            jax.block_until_ready(jax.jit(mapped)(ones))


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Values that every process holds, laid out over the devices of all of them.

    `shardings` is one for all leaves, or a tree of them. Unlike `jax.device_put`, which asks the other
    processes whether their values are the same, this sends nothing.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_placed, tree, shardings)


def _placed(leaf: Any, sharding: Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def whole(tree: PyTree) -> PyTree:
    """Numpy arrays on every process, also of what is spread over the devices of several; collective."""
    _waiting()
    return jax.tree.map(_whole, tree) if jax.process_count() > 1 else jax.device_get(tree)


def _whole(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return jax.device_get(leaf)


def by_row(count: int, numbers: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns [count] of float32, of which each process brings its rows; what nobody brings is NaN."""
    whole_columns = {name: np.full(count, np.nan, np.float32) for name in columns}
    part = [numbers.tolist(), {name: np.asarray(v, np.float32).tolist() for name, v in columns.items()}]
    for rows, values in gather(part):
        for name, column in values.items():
            whole_columns[name][rows] = column
    return whole_columns


def own_rows(array: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of rows, rows): this process's share of an array whose first axis is a batch.

    Each row is one process's, and the rows lie on that process's own devices; an array that every process
    holds whole is cut evenly.
    """
    count = array.shape[0]
    if array.is_fully_addressable or array.is_fully_replicated:
        ranks, rank = jax.process_count(), jax.process_index()
        numbers = np.arange(count * rank // ranks, count * (rank + 1) // ranks)
        value = array.addressable_data(0) if array.is_fully_replicated else array
        return numbers, np.asarray(value)[numbers]
    own = {s.index[0].indices(count)[:2]: s.data for s in array.addressable_shards if s.replica_id == 0}
    spans = sorted(own)
    if not spans:
        return np.zeros(0, int), np.zeros((0, *array.shape[1:]), array.dtype)
    rows = [np.asarray(own[span]) for span in spans]
    return np.concatenate([np.arange(*span) for span in spans]), np.concatenate(rows)
