"""Batches a piece at a time, so that every device works on rows that it already holds.

A batch of r rows lies over w devices, r / w neighbouring rows on each. A piece takes c rows from every
device: piece i is rows i c … i c + c - 1 of device 0, then those of device 1, … So cutting and joining are
reshapes, and nothing travels. With one device pieces are simply neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from smart_grpo_jax.core.types import PyTree


def even(rows: int, most: int) -> int:
    """Rows of a piece where at most `most` fit: no more pieces than that needs, all of one size, so that
    little is filled up."""
    calls = -(-rows // min(rows, max(1, most)))
    return -(-rows // calls)


def cut(tree: PyTree, chunk: int, ways: int) -> tuple[PyTree, Bool[Array, "calls size"]]:
    """[r, ...] → [calls, size, ...] with size at most `chunk` but at least one row per device, and which rows
    are real. The last piece is filled up with copies of each device's last row."""
    rows = jax.tree.leaves(tree)[0].shape[0]
    ways = ways if rows % ways == 0 else 1
    each = rows // ways
    size = even(each, chunk // ways)
    calls = -(-each // size)

    def one(a: Array) -> Array:
        a = a.reshape(ways, each, *a.shape[1:])
        if calls * size > each:
            a = a[:, np.minimum(np.arange(calls * size), each - 1)]
        a = jnp.swapaxes(a.reshape(ways, calls, size, *a.shape[2:]), 0, 1)
        return a.reshape(calls, ways * size, *a.shape[3:])

    place = jnp.arange(calls * size).reshape(calls, 1, size)
    real = jnp.broadcast_to(place < each, (calls, ways, size)).reshape(calls, ways * size)
    return jax.tree.map(one, tree), real


def join(tree: PyTree, rows: int, ways: int) -> PyTree:
    """The inverse of `cut`, for what was made of its pieces."""
    ways = ways if rows % ways == 0 else 1

    def one(a: Array) -> Array:
        calls, size = a.shape[0], a.shape[1] // ways
        a = jnp.swapaxes(a.reshape(calls, ways, size, *a.shape[2:]), 0, 1)
        return a.reshape(ways, calls * size, *a.shape[3:])[:, : rows // ways].reshape(rows, *a.shape[3:])

    return jax.tree.map(one, tree)


def in_pieces(
    fn: Callable[[PyTree], PyTree],
    chunk: int,
    tree: PyTree,
    ways: int = 1,
    constrain: Callable[[PyTree], PyTree] = lambda tree: tree,
) -> PyTree:
    """`fn` over the rows of a batch, at most `chunk` rows at a time (0: at once)."""
    rows = jax.tree.leaves(tree)[0].shape[0]
    if chunk == 0 or chunk >= rows:
        return fn(tree)
    pieces, _ = cut(tree, chunk, ways)
    return join(jax.lax.map(lambda piece: fn(constrain(piece)), pieces), rows, ways)
