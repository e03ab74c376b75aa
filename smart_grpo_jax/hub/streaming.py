"""From a weight file into device buffers, a piece at a time: the host never holds a whole large leaf.

A stacked leaf of FLUX is gigabytes, its largest single tensor a hundred megabytes. So a large leaf is
allocated where it will live and filled in place, layer by layer and, inside a tensor, in pieces of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from smart_grpo_jax.core.errors import UserError

PIECE = 16 * 2**20
"""Numbers in one piece: 64 MB in float32."""


def long_axis(shape: tuple[int, ...]) -> int:
    """The first axis that is longer than one, along which a tensor is read in pieces; 0 where none is."""
    return next((axis for axis, size in enumerate(shape) if size > 1), 0)


class Reader(Protocol):
    """Tensors by their published key."""

    def keys(self) -> set[str]:
        """All keys of the file or files."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        ...

    def tensor(self, key: str) -> np.ndarray:
        """Read one tensor."""
        ...

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Read [start:stop] along the first axis that is longer than one."""
        ...

    def file(self, key: str) -> str:
        """The name of the file that holds, or should hold, the tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Transform:
    """`read` turns a published tensor into ours, `write` turns ours back; both are axis orders."""

    order: tuple[int, ...] | None

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """published → ours."""
        return tensor if self.order is None else tensor.transpose(self.order)

    def write(self, tensor: np.ndarray) -> np.ndarray:
        """ours → published."""
        return tensor if self.order is None else tensor.transpose(np.argsort(self.order))

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The published shape of a tensor whose shape is `shape` here."""
        return shape if self.order is None else tuple(shape[axis] for axis in np.argsort(self.order))

    def axis(self, published: int) -> int:
        """Which of our axes is this one of the published tensor."""
        return published if self.order is None else self.order.index(published)


@dataclasses.dataclass(frozen=True)
class Part:
    """One published tensor of a leaf: its key, its shape here, and how it gets here."""

    key: str
    shape: tuple[int, ...]
    transform: Transform


def read_leaf(
    reader: Reader,
    parts: Sequence[Part],
    stacked: bool,
    dtype: Any = None,
    sharding: NamedSharding | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> jax.Array:
    """A leaf on its devices: the tensors of `parts` as its layers where it is `stacked`, else the one."""
    if len(parts) * math.prod(parts[0].shape) <= PIECE:
        tensors = [part.transform.read(floats(reader, part.key, reader.tensor(part.key))) for part in parts]
        progress(sum(tensor.size for tensor in tensors))
        leaf = np.stack(tensors) if stacked else tensors[0]
        return place(leaf if dtype is None else leaf.astype(dtype, copy=False), sharding)
    shape = (len(parts), *parts[0].shape) if stacked else parts[0].shape
    buffer = None
    for layer, part in enumerate(parts):
        for start, piece in pieces(reader, part):
            piece = piece if dtype is None else piece.astype(dtype, copy=False)
            starts = [0] * len(part.shape)
            starts[part.transform.axis(long_axis(part.transform.published(part.shape)))] = start
            if stacked:
                piece, starts = piece[None], [layer, *starts]
            if buffer is None:
                buffer = blank(shape, piece.dtype, sharding)
            buffer = filler(sharding)(buffer, place(piece, whole_axes(sharding, shape, piece)), starts)
            buffer.block_until_ready()  # else pieces that wait for their turn pile up on the host
            progress(piece.size)
    assert buffer is not None
    return buffer


def pieces(reader: Reader, part: Part) -> Iterator[tuple[int, np.ndarray]]:
    """(first published row, some rows in our layout) of a tensor, at most PIECE numbers each."""
    published = part.transform.published(part.shape)
    axis = long_axis(published)
    step, end = max(1, PIECE // math.prod(published[axis + 1 :])), published[axis]
    for start in range(0, end, step):
        rows = reader.rows(part.key, start, min(start + step, end))
        yield start, part.transform.read(floats(reader, part.key, rows))


def floats(reader: Reader, key: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor, if its type can be a weight's: a mislabelled file may call the same bytes integers."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{reader.file(key)}: {key!r} has dtype {tensor.dtype}, wanted floating point")
    return tensor


def read_exactly(file: str | Path, key: str, start: int, out: np.ndarray) -> np.ndarray:
    """`out` filled from byte `start` of a file; UserError where it ends before, or cannot be read."""
    buffer, done = out.view(np.uint8).data, 0
    try:
        with open(file, "rb", buffering=0) as raw:
            raw.seek(start)
            while done < len(buffer) and (got := raw.readinto(buffer[done:])):
                done += got
    except OSError as error:
        raise UserError(f"{file}: cannot read {key!r} ({error})") from error
    if done < len(buffer):
        raise UserError(f"{file}: ends inside {key!r}; has it been cut since it was opened?")
    return out


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """A host array on its devices; every process hands over only what its own devices hold."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def blank(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """Zeros, made where they will lie."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def filler(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    """buffer[starts : starts + piece.shape] = piece, in place."""
    update = lambda buffer, piece, starts: jax.lax.dynamic_update_slice(buffer, piece, starts)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


def whole_axes(
    sharding: NamedSharding | None, shape: tuple[int, ...], piece: np.ndarray
) -> NamedSharding | None:
    """The sharding of a piece: that of its leaf along the axes that it has in full."""
    if sharding is None:
        return None
    names = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    kept = [
        name if full == here else None for name, full, here in zip(names, shape, piece.shape, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
