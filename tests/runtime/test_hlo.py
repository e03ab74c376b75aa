"""Traffic and buffers read from compiled programs: a TPU's text by hand, and what this CPU compiles."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smart_grpo_jax.runtime import hlo
from smart_grpo_jax.runtime.mesh import make_mesh

TPU = """HloModule jit_f

%cond (p: (s32[], bf16[32,1024])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[32,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %bound = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (p: (s32[], bf16[32,1024])) -> (s32[], bf16[32,1024]) {
  %p = (s32[]{:T(128)}, bf16[32,1024]{1,0}) parameter(0)
  %w = bf16[1,256,1024]{2,1,0} fusion(%p), kind=kLoop, calls=%inner
  %gathered = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%w), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={1}, metadata={op_name="jit(f)/while/body/squeeze" stack_frame_id=7}
  ROOT %out = (s32[]{:T(128)}, bf16[32,1024]{1,0}) tuple(%p, %gathered)
}

%small (p: f32[]) -> f32[8] {
  %p = f32[] parameter(0)
  ROOT %r = f32[8] all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add, metadata={op_name="jit(f)/small"}
}

%large (p: f32[]) -> f32[64] {
  %p = f32[] parameter(0)
  ROOT %r = (f32[32], f32[64]) all-gather-start(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, metadata={op_name="jit(f)/large"}
}

%inner (p: bf16[4096,4096]) -> bf16[4096,4096] {
  ROOT %hidden = bf16[4096,4096]{1,0} parameter(0)
}

ENTRY %main (a: bf16[32,1024]) -> f32[] {
  %a = bf16[32,1024]{1,0} parameter(0)
  %t = (s32[], bf16[32,1024]{1,0}) tuple(%a, %a)
  %loop = (s32[]{:T(128)}, /*index=1*/bf16[32,1024]{1,0}) while(%t), condition=%cond, body=%body
  %pick = f32[8] conditional(%a, %a, %a), branch_computations={%small, %large}, metadata={op_name="jit(f)/cond"}
  %done = f32[8] all-reduce-done(%pick)
  ROOT %sum = f32[]{:T(128)} all-reduce(%done), channel_id=6, replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add, metadata={op_name="jit(f)/sum"}
}
"""  # noqa: E501

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def test_a_loops_traffic_counts_as_often_as_it_runs_and_the_costliest_branch_alone():
    found = {one.op_name: one for one in hlo.collectives(hlo.parse(TPU), MESH)}
    assert set(found) == {"while/body/squeeze", "sum", "large"}
    gather = found["while/body/squeeze"]
    assert (gather.kind, gather.axes, gather.times) == ("all-gather", ("fsdp",), 6)
    assert gather.sent == 6 * 2 * 1024 * 1024 * 3 / 4
    assert found["sum"].axes == ("data", "fsdp")
    assert found["sum"].sent == 2 * 4 * 7 / 8
    assert (found["large"].axes, found["large"].sent) == (("data",), 4 * 64 / 2)


def test_a_branch_counts_as_often_as_it_is_taken():
    """All of large's 64 numbers from one of two; small's 8 are summed along a ring of four."""
    found = {one.op_name: one.sent for one in hlo.collectives(hlo.parse(TPU), MESH, often=0.25)}
    assert found["large"] == 0.25 * 4 * 64 / 2
    assert found["small"] == 0.75 * 2 * 4 * 8 * 3 / 4
    never = {one.op_name for one in hlo.collectives(hlo.parse(TPU), MESH, often=0.0)}
    assert never == {"while/body/squeeze", "sum", "small"}


def test_groups_are_read_in_every_notation():
    assert hlo.group("replica_groups=[2,4]<=[4,2]T(1,0), x", 8) == [0, 2, 4, 6]
    assert hlo.group("replica_groups=[4,2]<=[8], x", 8) == [0, 1]
    assert hlo.group("replica_groups={{1,3},{0,2}}", 4) == [1, 3]
    assert hlo.group("replica_groups={}", 4) == [0, 1, 2, 3]
    assert hlo.group("source_target_pairs={{0,1},{1,0}}", 2) == [0, 1]
    assert hlo.group("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 8) == [0, 1, 4, 5]
    turned = "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) "
    assert hlo.group(turned + "{'a'}", 8) == [0, 1]
    assert hlo.group(turned + "{'b'}", 8) == [0, 2, 4, 6]


def test_buffers_inside_fusions_are_no_buffers():
    found = hlo.buffers(hlo.parse(TPU))
    assert found[0] == hlo.Buffer(2 * 1024 * 1024, "while/body/squeeze", "bf16[1,1024,1024]")
    assert all("4096" not in one.shape for one in found)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_what_this_machine_compiles_sends_what_the_formula_says():
    mesh = make_mesh(1, jax.device_count(), 1)
    put = lambda shape, *spec: jax.device_put(jnp.zeros(shape), NamedSharding(mesh, PartitionSpec(*spec)))

    def f(w, x):
        return jax.lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, w)[0]

    text = jax.jit(f).lower(put((5, 64, 64), None, "fsdp"), put((8, 64), "fsdp")).compile().as_text()
    found = hlo.collectives(hlo.parse(text), dict(mesh.shape))
    n = jax.device_count()
    gathered = [one for one in found if one.kind == "all-gather"]
    assert math.isclose(sum(one.sent for one in gathered), 5 * 64 * 64 * 4 * (n - 1) / n)
    assert {one.axes for one in found} == {("fsdp",)}


KERNEL = """HloModule jit_f

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(1024)} parameter(0)
  %splash.1 = f32[8]{0:T(1024)} custom-call(%p), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/attn/splash"}
  ROOT %sum = f32[8]{0} all-reduce(%splash.1), replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add
}
"""


def test_a_kernels_metadata_does_not_end_its_computation():
    """A line of it begins with a bracket: what follows such a kernel still counts."""
    module = hlo.parse(KERNEL)
    assert [one.name for one in module.computations["main"]] == ["p", "splash.1", "sum"]
    assert module.computations["main"][1].op_name == "attn/splash"
    (found,) = hlo.collectives(module, MESH)
    assert found.kind == "all-reduce" and found.axes == ("data", "fsdp") and found.sent == 2 * 32 * 7 / 8
