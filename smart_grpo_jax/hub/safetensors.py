"""Safetensors files: read tensor by tensor, written through a temporary name.

A folder holds `<base>.safetensors`, or shards with `<base>.safetensors.index.json`. Nothing is globbed:
published folders hold half-precision variants and single-file checkpoints beside them. Nothing here can
run code from a file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from smart_grpo_jax.core.errors import StorageError, UserError, nearest

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}


class Tensors:
    """The tensors of one model, in one file or several, read one at a time on demand."""

    def __init__(self, path: Path) -> None:
        """Open a `.safetensors` file, or a `.safetensors.index.json` with its shards."""
        self.path = path
        self.shards = shards_of(path)
        self.where: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.open = contextlib.ExitStack()
        self.handles = {}
        for name in sorted(set(self.shards.values())) if self.shards else [path.name]:
            self._add(path.parent / name)
        for key, name in self.shards.items():
            if self.where.get(key) != name:
                raise UserError(f"{path.name}: says that {key!r} is in {name}, which lacks it")

    def _add(self, file: Path) -> None:
        """Read the header of one file."""
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        try:
            handle = self.handles[file.name] = self.open.enter_context(safe_open(file, "np"))
            for key in handle.keys():
                part = handle.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    known = nearest(part.get_dtype(), DTYPES)
                    raise UserError(f"{file.name}: {key!r} has dtype {part.get_dtype()}, {known}")
                self.where[key], self.shapes[key] = file.name, tuple(part.get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error})") from error

    def keys(self) -> set[str]:
        """All keys."""
        return set(self.where)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self.shapes[key]

    def tensor(self, key: str) -> np.ndarray:
        """Read one tensor; bfloat16 arrives as ml_dtypes.bfloat16."""
        try:
            return self.handles[self.where[key]].get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.file(key)}: cannot read {key!r} ({error})") from error

    def metadata(self) -> dict[str, str]:
        """The header's remarks of the first file."""
        return next(iter(self.handles.values())).metadata() or {}

    def file(self, key: str) -> str:
        """The path of the file that holds, or should hold, the tensor."""
        return str(self.path.parent / self.where.get(key, self.path.name))


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
