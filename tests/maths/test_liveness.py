"""The count of what lives at once, against programs whose peak is known by hand."""

import jax
import jax.numpy as jnp
import pytest

from smart_grpo_jax.maths import liveness

N = 64
SQUARE = 4 * N * N
"""Bytes of a float32 matrix."""


def arrays(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def test_a_chain_of_products_keeps_two_results():
    """The operand and the result of a product lie there together; the first operand is an argument."""
    x, w = arrays((N, N), (N, N))
    assert liveness.peak(lambda x, w: x @ w @ w @ w @ w, x, w) == 2 * SQUARE


def test_elementwise_results_take_the_place_of_their_operand():
    x, w = arrays((N, N), (N, N))
    assert liveness.peak(lambda x, w: jnp.sin(jnp.exp(x @ w)) + 1.0, x, w) == SQUARE


def test_what_is_larger_than_its_origin_is_made_again():
    (x,) = arrays((N,))
    assert liveness.peak(lambda x: (jnp.broadcast_to(x, (N, N, N)) * 2).sum(), x) < SQUARE


def test_the_gradient_keeps_what_the_forward_pass_made_unless_it_is_recomputed():
    """Ten layers: ten states are kept; with recomputation of each layer, too, but nothing inside it."""
    x, w = arrays((N, N), (10, N, N))

    def loss(w, x, layer):
        return (jax.lax.scan(lambda h, w: (layer(h, w), None), x, w)[0] ** 2).sum()

    def layer(h, w):
        wide = jnp.tanh(jnp.concatenate([h] * 8, axis=1) @ jnp.concatenate([w] * 8))
        return jnp.sin(wide @ w)

    kept = liveness.peak(lambda w, x: jax.grad(loss)(w, x, layer), w, x)
    again = liveness.peak(lambda w, x: jax.grad(loss)(w, x, jax.checkpoint(layer)), w, x)
    assert 10 * SQUARE <= again < 0.5 * kept


def test_a_loop_counts_its_body_once_and_its_stacked_results_all():
    (x,) = arrays((N, N))
    step = lambda h, _: (h @ h, h)
    one, many = (liveness.peak(lambda x, k=k: jax.lax.scan(step, x, None, length=k)[1], x) for k in (1, 9))
    assert many - one == 8 * SQUARE


def test_the_dearer_branch_counts():
    x, w = arrays((N, N), (N, N))
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: (x @ w @ w @ w).sum(), lambda: x.sum())
    assert liveness.peak(branch, x, w) >= 2 * SQUARE


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_is_a_straight_line(rows):
    """8 floats and a gathered matrix: the base is found whatever the first batch is."""
    (w,) = arrays((3, N, N))

    def layers(n):
        x = jax.ShapeDtypeStruct((n, N), jnp.float32)
        return liveness.peak(lambda x, w: jax.lax.scan(lambda h, w: (h @ w, None), x, w)[0], x, w)

    base, slope = liveness.per_row(layers, rows)
    assert base == SQUARE and slope == 2 * 4 * N
