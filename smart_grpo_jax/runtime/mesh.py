"""The device mesh: three named axes, and how batches lie on it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (an alias in jax)
) -> Mesh:
    """The mesh data × fsdp × tensor over all devices; data = 0 means "all that remain".

    Axis types are Auto: with `jax.make_mesh`'s default (Explicit) a reshape of a sharded batch raises.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, inner = len(devices), fsdp * tensor
    for axis, size, least in (("data", data, 0), ("fsdp", fsdp, 1), ("tensor", tensor, 1)):
        if size < least:
            raise UserError(f"mesh.{axis}: got {size}, want {least} or more")
    if count % inner:
        raise UserError(f"mesh.fsdp: got {fsdp} × mesh.tensor {tensor}, want a divisor of {count} devices")
    if data not in (0, count // inner):
        raise UserError(
            f"mesh.data: got {data}, want {count // inner} "
            f"({count} devices / fsdp {fsdp} / tensor {tensor}), or 0 for all that remain"
        )
    placed = arranged((count // inner, fsdp, tensor), devices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arranged(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the order in which neighbours in the mesh are neighbours in the torus.

    An axis of the mesh may take a part of an axis of the torus (fsdp 8 on 4 × 4 chips). Slices are cut along
    data, since what goes between them goes over the hosts' network.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and slices > 1 and shape[0] % slices == 0:
        within = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def ways_of(mesh: Mesh) -> int:
    """The devices that a batch lies over: data × fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of an array is spread over data and fsdp together."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


REPLICATED_BYTES = 2 * 2**30
"""Frozen parameters up to this size lie whole on every device; larger ones are spread over `fsdp`."""

SMALL = 2**16
"""Leaves of fewer numbers than this are never worth a gather."""


def at_rest(mesh: Mesh, params: PyTree, limit: int = REPLICATED_BYTES) -> PyTree:
    """Where the leaves of frozen parameters lie: replicated, or spread over `fsdp` along their longest axis
    that divides (the compiler gathers them where they are used)."""
    ways = mesh.shape["fsdp"]
    whole = ways == 1 or sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params)) <= limit

    def lie(a: jax.Array) -> NamedSharding:
        fits = [axis for axis, size in enumerate(a.shape) if size % ways == 0]
        if whole or a.size < SMALL or not fits:
            return replicated(mesh)
        longest = max(fits, key=lambda axis: a.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(lie, params)


def pad_groups(groups: int, members: int, mesh: Mesh, parts: int = 1) -> int:
    """The smallest groups' ≥ groups with groups' × members divisible by data × fsdp × parts.

    The groups that are added are computed and weigh nothing, so what is learned does not depend on the mesh.
    """
    return filled(groups, members, parts * ways_of(mesh))


def filled(groups: int, members: int, ways: int) -> int:
    """The smallest groups' ≥ groups with groups' × members divisible by ways."""
    unit = ways // math.gcd(ways, members)
    return -(-groups // unit) * unit


def local_devices_summary() -> str:
    """What this process computes on, such as `4 × TPU v5 lite (15.7 GiB each), process 1 of 2`."""
    local = jax.local_devices()
    parts = [f"{n} × {kind}" for kind, n in Counter(d.device_kind for d in local).items()]
    limit = (local[0].memory_stats() or {}).get("bytes_limit", 0)
    if limit:
        parts[-1] += f" ({limit / 2**30:.1f} GiB each)"
    if local[0].platform == "cpu":
        parts.append(f"{len(os.sched_getaffinity(0))} cores")
    if jax.process_count() > 1:
        parts.append(f"process {jax.process_index() + 1} of {jax.process_count()}")
    return ", ".join(parts)
