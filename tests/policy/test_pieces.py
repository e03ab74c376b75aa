"""Cutting a batch into pieces and joining it again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.policy import pieces

CASES = [
    (12, 5, 1),
    (12, 12, 1),
    (12, 1, 4),
    (12, 8, 4),
    (12, 9, 4),
    (24, 7, 8),
    (10, 4, 4),
    (1, 3, 1),
    (6, 100, 2),
]


@pytest.mark.parametrize(("rows", "chunk", "ways"), CASES)
def test_joining_undoes_cutting(rows, chunk, ways):
    tree = {"a": jnp.arange(rows), "b": jnp.arange(rows * 6.0).reshape(rows, 2, 3)}
    cut, real = pieces.cut(tree, chunk, ways)
    assert cut["b"].shape[:2] == real.shape and cut["b"].shape[2:] == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, pieces.join(cut, rows, ways), tree)
    assert sorted(np.asarray(cut["a"])[np.asarray(real)]) == list(range(rows))


def test_pieces_are_even_so_that_little_is_filled_up():
    """72 rows where 43 fit are twice 36 and not 43 + 29 filled up to 86; 71 of 144 are three times 48."""
    found = [pieces.even(rows, most) for rows, most in ((72, 43), (144, 71), (72, 16), (5, 9), (5, 0))]
    assert found == [36, 48, 15, 5, 1]
    cut, real = pieces.cut(jnp.arange(72), 43, 1)
    assert cut.shape == (2, 36) and bool(real.all())


@pytest.mark.parametrize(("rows", "chunk", "ways"), [(24, 8, 4), (24, 4, 4), (16, 2, 8)])
def test_a_piece_takes_as_many_rows_of_every_device(rows, chunk, ways):
    cut, _ = pieces.cut(jnp.arange(rows), chunk, ways)
    owner = np.asarray(cut) // (rows // ways)
    for piece in owner:
        np.testing.assert_array_equal(piece, np.repeat(np.arange(ways), piece.size // ways))


def test_one_device_takes_neighbours_in_order():
    cut, real = pieces.cut(jnp.arange(7), 3, 1)
    np.testing.assert_array_equal(cut, [[0, 1, 2], [3, 4, 5], [6, 6, 6]])
    np.testing.assert_array_equal(real, [[1, 1, 1], [1, 1, 1], [1, 0, 0]])


def test_keys_are_rows_like_others():
    keys = jax.random.split(jax.random.key(0), 7)
    out = pieces.in_pieces(jax.vmap(lambda key: jax.random.uniform(key)), 3, keys)
    np.testing.assert_array_equal(out, jax.vmap(jax.random.uniform)(keys))


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 99])
def test_a_function_of_rows_does_not_notice(chunk):
    x = jnp.arange(12.0).reshape(12, 1)
    for ways in (1, 2, 4):
        np.testing.assert_array_equal(pieces.in_pieces(lambda a: a**2, chunk, x, ways), x**2)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_nothing_travels():
    from functools import partial

    from smart_grpo_jax.jobs.layout import spread
    from smart_grpo_jax.runtime import hlo
    from smart_grpo_jax.runtime.mesh import batch_sharding, make_mesh

    mesh = make_mesh(0, 1, 1)
    ways = jax.device_count()
    x = jax.device_put(jnp.zeros((6 * ways, 64, 64)), batch_sharding(mesh))
    fn = jax.jit(
        lambda x: pieces.in_pieces(lambda a: jnp.tanh(a @ a), 2 * ways, x, ways, partial(spread, mesh))
    )
    text = fn.lower(x).compile().as_text()
    assert not hlo.collectives(hlo.parse(text), dict(mesh.shape))
