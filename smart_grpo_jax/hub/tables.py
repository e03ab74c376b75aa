"""Weight-name tables, used both ways: published files ⇄ parameter trees. The tables are in `weights.py`.

A table is a list of (regex on our path, published key, transform). Our tree names its modules as the
file does, so that most of a key is the path with '/' for '.'; `{i}` is the layer of a stacked leaf. The
leaves come from the model's abstract parameters: every leaf must find its tensors, of its shape, and
every tensor of the file its leaf.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import streaming
from smart_grpo_jax.hub.streaming import Part, Reader, Transform


@dataclasses.dataclass(frozen=True)
class Row:
    """Paths that match `path` have the key `key` (a template of the match) and the transform.

    `first` tells which layer of the file is layer 0 of a stacked leaf; None for a leaf of one layer.
    """

    path: str
    key: str
    transform: Transform
    first: Callable[[Any], int] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a model, tried in order, and how its abstract parameters are made."""

    name: str
    rows: tuple[Row, ...]
    abstract: Callable[[Any], PyTree]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def place(self, path: str) -> tuple[Row, str]:
        """The row of a path, and its key with `{i}` left open."""
        for row in self.rows:
            if match := re.fullmatch(row.path, path):
                return row, dotted(match.expand(row.key))
        raise UserError(f"{self.name}: no row of the weight table matches {path!r}")

    def canonical(self, key: str) -> str:
        """The key as newer files write it."""
        for old, new in self.aliases:
            key = re.sub(old, new, key)
        return key

    def found(self, reader: Reader) -> dict[str, str]:
        """Canonical key → key of the file. A tensor stored under its old and its new name counts once."""
        keys = {self.canonical(key): key for key in reader.keys()}
        return keys | {key: key for key in reader.keys() if self.canonical(key) == key}


NUMBERED = re.compile(
    r"\b(to_out|net|layer|down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers)_(\d+)\b"
)


def dotted(path: str) -> str:
    """to_out_0/x → to_out.0.x: where a module list of the file is part of one of our names."""
    return NUMBERED.sub(r"\1.\2", path).replace("/", ".")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf lies in a file: its keys (one per layer if stacked), its shape without layers."""

    path: str
    keys: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    transform: Transform


def places(table: Table, config: Any) -> Iterator[Place]:
    """All leaves of a model and their published keys."""
    for path, leaf in cast(dict[str, Any], flatten_dict(table.abstract(config), sep="/")).items():
        row, key = table.place(path)
        if row.first is None:
            yield Place(path, (key,), False, leaf.shape, row.transform)
        else:
            start = row.first(config)
            keys = tuple(key.format(i=start + i) for i in range(leaf.shape[0]))
            yield Place(path, keys, True, leaf.shape[1:], row.transform)


def to_params(
    table: Table,
    config: Any,
    reader: Reader,
    dtype: Any = None,
    sharding: Callable[[str], Any] = lambda path: None,
    progress: Callable[[int], None] = lambda count: None,
) -> PyTree:
    """Read a parameter tree, leaf by leaf; `dtype` None keeps what the file holds.

    `sharding(path)` says where a leaf lies (None: the default device); `progress` hears how many numbers
    have been read.
    """
    keys = table.found(reader)
    all_places = list(places(table, config))
    check_keys(table, {key for place in all_places for key in place.keys}, keys, reader)
    leaves = {}
    for place in all_places:
        for key in place.keys:
            check_shape(table, place, keys[key], reader)
        parts = [Part(keys[key], place.shape, place.transform) for key in place.keys]
        leaves[place.path] = streaming.read_leaf(
            reader, parts, place.stacked, dtype, sharding(place.path), progress
        )
    return unflatten_dict(leaves, sep="/")


def check_keys(table: Table, wanted: set[str], found: Mapping[str, str], reader: Reader) -> None:
    """No tensor may be missing or unknown: one UserError that names the first of each kind."""
    missing = sorted(wanted - set(found))
    unknown = sorted(k for k in set(found) - wanted if not any(re.fullmatch(p, k) for p in table.ignored))
    if missing:
        raise UserError(
            f"{reader.file(missing[0])}: {table.name} lacks {missing[0]!r} ({len(missing)} missing, "
            f"{len(unknown)} unknown{f', first {unknown[0]!r}' if unknown else ''})"
        )
    if unknown:
        raise UserError(
            f"{reader.file(found[unknown[0]])}: {table.name} knows no {unknown[0]!r} "
            f"({len(unknown)} unknown; {nearest(unknown[0], wanted)})"
        )


def check_shape(table: Table, place: Place, key: str, reader: Reader) -> None:
    """The tensor must have the shape that the model wants."""
    want = place.transform.published(place.shape)
    if (got := reader.shape(key)) != want:
        raise UserError(f"{reader.file(key)}: {table.name} {key!r} has shape {got}, wanted {want}")


def to_tensors(table: Table, config: Any, params: PyTree) -> dict[str, np.ndarray]:
    """A parameter tree as published tensors, contiguous, in the dtype of the leaves."""
    leaves = flatten_dict(params, sep="/")
    wanted = {place.path for place in places(table, config)}
    if lacking := wanted - set(leaves):
        raise UserError(f"{table.name}: the parameters lack {min(lacking)!r}")
    if surplus := set(leaves) - wanted:
        raise UserError(f"{table.name}: the parameters hold an unknown {min(surplus)!r}")
    return {key: make() for key, _, make in lazily(table, config, leaves.__getitem__)}


def lazily(
    table: Table, config: Any, leaf: Callable[[str], Any]
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(key, published shape, how to get the tensor) of all tensors; `leaf(path)` gives a whole leaf.

    A tensor comes to the host when it is asked for, one layer of a stacked leaf at a time.
    """
    for place in places(table, config):
        for layer, key in enumerate(place.keys):

            def make(place: Place = place, layer: int = layer) -> np.ndarray:
                array = leaf(place.path)
                want = (len(place.keys), *place.shape) if place.stacked else place.shape
                if array.shape != want:
                    raise UserError(f"{table.name}: {place.path!r} has shape {array.shape}, wanted {want}")
                one = np.asarray(array[layer] if place.stacked else array)
                return np.ascontiguousarray(place.transform.write(one))

            yield key, place.transform.published(place.shape), make
