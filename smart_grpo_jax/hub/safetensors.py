"""Safetensors files: read tensor by tensor or in rows, written through a temporary name.

A folder holds `<base>.safetensors`, or shards with `<base>.safetensors.index.json`. Nothing is globbed:
published folders hold half-precision variants and single-file checkpoints beside them. Nothing here can
run code from a file. The library proves a header sound; the bytes are then read with plain reads, since
pages of a memory map count as memory of this process until the system takes them back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smart_grpo_jax.core.errors import StorageError, UserError, nearest
from smart_grpo_jax.hub.streaming import long_axis, read_exactly

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}


class Span(NamedTuple):
    """Where a tensor lies: its file, its dtype and shape, the first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Tensors:
    """The tensors of one model, in one file or several, read on demand."""

    def __init__(self, path: Path) -> None:
        """Open a `.safetensors` file, or a `.safetensors.index.json` with its shards."""
        self.path = path
        shards = shards_of(path)
        self.spans: dict[str, Span] = {}
        self.remarks: dict[str, str] = {}
        for name in sorted(set(shards.values())) if shards else [path.name]:
            spans, remarks = header(path.parent / name)
            self.spans |= spans
            self.remarks |= remarks
        for key, name in shards.items():
            if key not in self.spans or self.spans[key].file.name != name:
                raise UserError(f"{path.name}: says that {key!r} is in {name}, which lacks it")

    def keys(self) -> set[str]:
        """All keys."""
        return set(self.spans)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self.spans[key].shape

    def dtype(self, key: str) -> np.dtype:
        """The type of a tensor, from the header."""
        return self.spans[key].dtype

    def tensor(self, key: str) -> np.ndarray:
        """Read one tensor; bfloat16 arrives as ml_dtypes.bfloat16."""
        span = self.spans[key]
        return self._read(key, 0, math.prod(span.shape)).reshape(span.shape)

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Read [start:stop] along the first axis that is longer than one."""
        shape = self.spans[key].shape
        axis = long_axis(shape)
        width = math.prod(shape[axis + 1 :])
        part = self._read(key, start * width, (stop - start) * width)
        return part.reshape(*shape[:axis], stop - start, *shape[axis + 1 :])

    def _read(self, key: str, skip: int, count: int) -> np.ndarray:
        """`count` numbers of a tensor, after the first `skip`."""
        span = self.spans[key]
        start = span.start + skip * span.dtype.itemsize
        return read_exactly(span.file, key, start, np.empty(count, span.dtype))

    def metadata(self) -> dict[str, str]:
        """The headers' remarks."""
        return self.remarks

    def file(self, key: str) -> str:
        """The path of the file that holds, or should hold, the tensor."""
        return str(self.spans[key].file if key in self.spans else self.path)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(span.shape) * span.dtype.itemsize for span in self.spans.values())

    def fingerprint(self) -> str:
        """A hash of every name, type, shape and first kilobyte: other weights give another one, without
        reading them all."""
        found = hashlib.sha256()
        for key in sorted(self.spans):
            span = self.spans[key]
            found.update(f"{key} {span.dtype.name} {span.shape}".encode())
            head = self._read(key, 0, min(math.prod(span.shape), 1024 // span.dtype.itemsize))
            found.update(head.tobytes())
        return found.hexdigest()


def header(file: Path) -> tuple[dict[str, Span], dict[str, str]]:
    """The tensors and the remarks of one file; the library has checked offsets, sizes and the length."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, "np") as proven:
            keys, remarks = list(proven.keys()), dict(proven.metadata() or {})
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            entries = json.loads(raw.read(length), object_pairs_hook=without_repeats)
    except (SafetensorError, OSError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from error
    spans = {}
    for key in keys:
        entry: Mapping[str, Any] = entries.get(key, {})
        if entry.get("dtype") not in DTYPES:
            known = nearest(str(entry.get("dtype")), DTYPES)
            raise UserError(f"{file.name}: {key!r} has dtype {entry.get('dtype')}, {known}")
        start = 8 + length + entry["data_offsets"][0]
        spans[key] = Span(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return spans, remarks


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; readers disagree on which of two equal keys counts, so neither does."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def shards_of(path: Path) -> dict[str, str]:
    """key → shard of an index file; empty for a single file. A shard must lie beside its index."""
    if path.suffix != ".json":
        return {}
    try:
        shards = dict(json.loads(path.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not an index of shards ({error})") from error
    for name in shards.values():
        if not isinstance(name, str) or name != os.path.basename(name):
            raise UserError(f"{path}: shard {name!r} is not a file name")
    if not shards:
        raise UserError(f"{path}: names no tensor")
    return shards


def open_folder(folder: Path, base: str) -> Tensors:
    """The weights of a component folder: the index if there is one, else the single file."""
    index = folder / f"{base}.safetensors.index.json"
    return Tensors(index if index.is_file() else folder / f"{base}.safetensors")


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write one file; it appears under its name only when it is complete.

    The default header `format: pt` is what older diffusers insist on.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    parts = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in names:
            raise UserError(f"{path.name}: {key!r} has dtype {tensor.dtype}, wanted one of {sorted(DTYPES)}")
        parts[key] = np.asarray(tensor, order="C")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(parts, temporary, dict(metadata or {"format": "pt"}))
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: could not be written ({error})") from error
