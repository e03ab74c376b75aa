"""Bytes to and from memory: by hand, and of a program whose traffic is known."""

import jax
import jax.numpy as jnp

from smart_grpo_jax.runtime import hlo, hlo_memory

TEXT = """
HloModule m

%sliced (p.0: f32[24,8,8], p.1: s32[]) -> f32[8,8] {
  %p.0 = f32[24,8,8]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %c = s32[] constant(0)
  %d = f32[1,8,8]{2,1,0} dynamic-slice(%p.0, %p.1, %c, %c), dynamic_slice_sizes={1,8,8}
  ROOT %b = f32[8,8]{1,0} bitcast(%d)
}

%put (q.0: f32[24,8,8], q.1: f32[1,8,8], q.2: s32[]) -> f32[24,8,8] {
  %q.0 = f32[24,8,8]{2,1,0} parameter(0)
  %q.1 = f32[1,8,8]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %u = f32[24,8,8]{2,1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2, %q.2)
}

ENTRY %main (a: f32[24,8,8], i: s32[], n: f32[1,8,8]) -> f32[24,8,8] {
  %a = f32[24,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %n = f32[1,8,8]{2,1,0} parameter(2)
  %f = f32[8,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
  %v = f32[8,8]{1,0:T(8,128)S(1)} dot(%f, %f), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %w = f32[24,8,8]{2,1,0} fusion(%a, %n, %i), kind=kLoop, calls=%put
}
"""
TILE = 4 * 8 * 8


def test_slices_are_read_and_written_as_slices_and_memory_on_the_chip_is_free():
    """A slice in and out, the index, two operands of a product, a new row read and written, the index."""
    assert hlo_memory.moved(hlo.parse(TEXT)) == (TILE + 4) + TILE + 2 * TILE + (TILE + TILE + 4)


def test_a_loop_moves_its_body_as_often_as_it_runs():
    """Ten products of the same size: three matrices each, within what copies of the state may add."""
    n = 128
    step = lambda h, w: (h @ w, None)
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, n), (10, n, n)))
    text = jax.jit(lambda x, w: jax.lax.scan(step, x, w)[0]).lower(x, w).compile().as_text()
    found = hlo_memory.moved(hlo.parse(text)) / (4 * n * n)
    assert 30 <= found <= 75
