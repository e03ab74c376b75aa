import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from smart_grpo_jax.maths import flops

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
SQUARE = jnp.ones((4, 4))
CUBE = 2 * 4**3


def test_matrix_products():
    assert flops.count(jnp.dot, A, B) == 2 * 3 * 5 * 7
    q = jnp.ones((2, 6, 3, 8))
    assert flops.count(lambda q: jnp.einsum("bshd,bthd->bhst", q, q), q) == 2 * 2 * 3 * 6 * 6 * 8
    assert flops.count(lambda x: jnp.sin(x) + x, A) == 0


def test_gradient_of_a_product_costs_twice_the_product():
    loss = lambda a, b: (a @ b).sum()
    # Of the forward product only the sum is needed, but the jaxpr still computes it.
    assert flops.count(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * 2 * 3 * 5 * 7


def conv(x, k, **options):
    return jax.lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def test_convolutions():
    x, k = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6, 10))
    assert flops.count(lambda: conv(x, k, window_strides=(1, 1), padding="SAME")) == 2 * 2 * 64 * 10 * 9 * 6
    assert flops.count(lambda: conv(x, k, window_strides=(2, 2), padding="SAME")) == 2 * 2 * 16 * 10 * 9 * 6
    depthwise = jnp.ones((3, 3, 1, 6))
    counted = flops.count(
        lambda: conv(x, depthwise, window_strides=(1, 1), padding="SAME", feature_group_count=6)
    )
    assert counted == 2 * 2 * 64 * 6 * 9


def test_a_transposed_convolution_does_not_multiply_its_zeros():
    x, k = jnp.ones((1, 4, 4, 2)), jnp.ones((2, 2, 2, 3))
    up = lambda: conv(x, k, window_strides=(1, 1), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2))
    # Every input meets every tap once.
    assert flops.count(up) == 2 * 16 * 2 * 3 * 4


def scanned(x, length):
    return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=length)[0]


def test_a_scan_counts_as_often_as_it_runs():
    assert flops.count(lambda x: scanned(x, 13), SQUARE) == 13 * CUBE
    nested = lambda x: jax.lax.scan(lambda c, _: (scanned(c, 5), None), x, None, length=3)[0]
    assert flops.count(nested, SQUARE) == 15 * CUBE
    assert flops.count(lambda x: jax.lax.fori_loop(0, 6, lambda _, c: c @ c, x), SQUARE) == 6 * CUBE


def test_a_scan_equals_its_unrolled_loop():
    def unrolled(x):
        for _ in range(13):
            x = x @ x
        return x

    grad = lambda f: jax.grad(lambda x: f(x).sum())
    assert flops.count(grad(unrolled), SQUARE) == flops.count(grad(lambda x: scanned(x, 13)), SQUARE)


def test_jit_and_custom_derivatives_are_looked_into():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x.T + x.T @ g,))

    @jax.custom_jvp
    def other(x):
        return x @ x

    other.defjvp(lambda x, dx: (other(x[0]), dx[0] @ x[0] + x[0] @ dx[0]))
    assert flops.count(jax.jit(lambda x: square(x) + other(x)), SQUARE) == 2 * CUBE
    assert flops.count(jax.grad(lambda x: square(x).sum()), SQUARE) == 3 * CUBE


def test_rematerialisation_costs_the_forward_pass_again():
    def block(x):
        return jnp.sin(x @ x) @ x

    grad = lambda f: flops.count(jax.grad(lambda x: f(x).sum()), SQUARE)
    plain, remat = grad(block), grad(jax.checkpoint(block))
    # The last product of the block is not needed again.
    assert plain == 6 * CUBE and remat == plain + CUBE


def test_cond_counts_its_dearest_branch():
    f = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert flops.count(f, SQUARE) == 2 * CUBE
    assert flops.count(f, SQUARE, often=0.25) == 0.25 * 2 * CUBE + 0.75 * CUBE


def test_a_while_loop_counts_once_and_is_reported():
    f = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)
    assert flops.tally(f, SQUARE) == (CUBE, 1)
    assert flops.tally(lambda x: scanned(x, 3), SQUARE).while_loops == 0


def test_shards_add_up_to_the_whole():
    mesh = jax.sharding.AbstractMesh((8, 2), ("data", "tensor"))
    product = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P(None, "tensor")), out_specs=P("data", "tensor")
    )
    a, b = jax.ShapeDtypeStruct((16, 5), jnp.float32), jax.ShapeDtypeStruct((5, 6), jnp.float32)
    assert flops.count(product, a, b) == 2 * 16 * 5 * 6


def test_a_pallas_kernel_counts_once_per_cell():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    product = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((4, 8), lambda i: (i, 0)), pl.BlockSpec((8, 8), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((4, 8), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32),
    )
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert flops.count(product, shape, shape) == 2 * 8**3


def test_shapes_are_enough():
    big = jax.ShapeDtypeStruct((100_000, 100_000), jnp.bfloat16)
    assert flops.count(jnp.dot, big, big) == pytest.approx(2e15)
