import json
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime import aot, topologies
from smart_grpo_jax.runtime import mesh as meshes

COUNT = jax.device_count()


def test_data_zero_takes_all_that_remain():
    mesh = meshes.make_mesh(0, 1, 1)
    assert dict(mesh.shape) == {"data": COUNT, "fsdp": 1, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_can_take_some_devices():
    assert meshes.make_mesh(1, 1, 1, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "start"),
    [
        ((COUNT + 2, 1, 1), f"mesh.data: got {COUNT + 2}, want {COUNT}"),
        ((0, COUNT + 1, 1), f"mesh.fsdp: got {COUNT + 1}"),
        ((-1, 1, 1), "mesh.data: got -1, want 0 or more"),
        ((0, 1, 0), "mesh.tensor: got 0, want 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(sizes, start):
    with pytest.raises(UserError) as error:
        meshes.make_mesh(*sizes)
    assert error.value.line.startswith(start)


class FakeMesh:
    def __init__(self, data, fsdp):
        self.shape = {"data": data, "fsdp": fsdp, "tensor": 2}


@pytest.mark.parametrize("members", [1, 3, 4, 24])
@pytest.mark.parametrize("ways", [(1, 1), (4, 1), (2, 4), (3, 5)])
def test_padding_is_the_smallest_that_divides(members, ways):
    mesh, product = FakeMesh(*ways), ways[0] * ways[1]
    for groups in (1, 2, 7, 48):
        padded = meshes.pad_groups(groups, members, mesh)
        fits = [g for g in range(groups, groups + product + 1) if g * members % product == 0]
        assert padded == fits[0]


def test_shardings_split_the_batch_and_nothing_else():
    mesh = meshes.make_mesh(0, 1, 1)
    assert meshes.batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert meshes.replicated(mesh).is_fully_replicated
    x = jax.device_put(jnp.zeros((COUNT * 2, 3)), meshes.batch_sharding(mesh))
    assert x.addressable_shards[0].data.shape == (2, 3)
    assert jax.jit(lambda a: a.reshape(-1) @ a.reshape(-1))(x) == 0  # Auto axes: no sharding error


def test_the_summary_names_the_devices():
    text = meshes.local_devices_summary()
    assert text.startswith(f"{jax.local_device_count()} × {jax.devices()[0].device_kind}")


def test_large_frozen_parameters_are_spread_over_fsdp_along_an_axis_that_divides():
    mesh = meshes.make_mesh(0, COUNT, 1)
    wide, odd = jnp.zeros((300, 256 * COUNT)), jnp.zeros((257, 263))
    tree = {"table": wide, "odd": odd, "bias": jnp.zeros(4 * COUNT)}
    lie = meshes.at_rest(mesh, tree, limit=0)
    wanted = PartitionSpec(None, "fsdp") if COUNT > 1 else PartitionSpec()
    assert lie["table"].spec == wanted
    assert lie["bias"].spec == PartitionSpec()
    assert lie["odd"].spec == PartitionSpec() or 257 % COUNT == 0 or 263 % COUNT == 0
    placed = jax.device_put(tree, lie)
    assert placed["table"].addressable_shards[0].data.shape == (300, 256)
    everywhere = meshes.at_rest(mesh, tree)
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(everywhere))


LOOK = """
import json, sys
from smart_grpo_jax.runtime import aot, topologies
name, *axes = json.loads(sys.argv[1])
mesh = aot.mesh_of(topologies.parse(name), *axes)
told = lambda d: (d.id, getattr(d, "slice_index", 0))
print(json.dumps([[told(d) for d in row] for row in mesh.devices.reshape(-1, axes[1])]))
"""


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("name", "fsdp"), [("v6e:4x4", 8), ("v5e:4x4", 2), ("v5p:2x2x2", 4), ("v5e:16x16", 32), ("2xv5e:4x4", 4)]
)
def test_an_axis_may_take_a_part_of_an_axis_of_the_torus_and_slices_are_cut_along_data(name, fsdp):
    topology = topologies.parse(name)
    done = subprocess.run(  # libtpu stays out of the process of the other tests
        [sys.executable, "-c", LOOK, json.dumps([name, 0, fsdp, 1])],
        env=aot.environment(topology, exact=False),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    copies = json.loads(done.stdout.splitlines()[-1])
    assert len({device for row in copies for device, _ in row}) == topology.chips
    assert all(len({slice_ for _, slice_ in row}) == 1 for row in copies)
