"""What makes a checkpoint: a record of every file and of every array, written last.

One flipped bit in a stored array is read back without an error by orbax (12 of 12 tries), so the
record holds sha256 sums of the files, of the arrays, and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.runtime.files import write_atomic

NAME = "manifest.json"
FORMAT = 1


class Damaged(Exception):
    """A checkpoint is not what its manifest says; the message names the file or the array."""


class LeafRecord(NamedTuple):
    """One array of the state, without its numbers."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def kind(self) -> str:
        """`float32[300,500]`."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path, such as `params/blocks/kernel`, sorted."""
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise ValueError(f"two leaves of the state are called {name}")
        flat[name] = leaf
    return dict(sorted(flat.items()))


def host_copy(leaf: Any) -> np.ndarray:
    """The whole array on this host, in memory of its own; collective where no process sees it whole."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return np.array(leaf.addressable_data(0))
        return np.array(multihost_utils.process_allgather(leaf, tiled=True))
    return np.array(leaf)


def leaf_record(array: np.ndarray) -> LeafRecord:
    """Type, shape and sha256 of the bytes in row-major order."""
    digest = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
    return LeafRecord(str(array.dtype), tuple(array.shape), digest)


def hash_records(records: dict[str, LeafRecord]) -> str:
    """sha256 over the sorted lines `path dtype shape sha256(bytes)`."""
    total = hashlib.sha256()
    for name in sorted(records):
        total.update(f"{name}\0{records[name].kind}\0{records[name].sha256}\n".encode())
    return total.hexdigest()


def state_hash(tree: PyTree) -> str:
    """One name for the bits of a whole pytree: paths, types, shapes and bytes of all its leaves."""
    return hash_records({name: leaf_record(host_copy(leaf)) for name, leaf in flatten(tree).items()})


def file_sum(path: Path, *, sync: bool = False) -> tuple[int, str]:
    """Size and sha256 of a file; `sync` also forces it onto the disk."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return file.tell(), digest


def list_files(folder: Path) -> list[str]:
    """All files below the folder but the manifest, as relative names, sorted."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return sorted(name for name in names if name != NAME)


def _digest(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_manifest(folder: Path, records: dict[str, LeafRecord], fields: dict[str, Any]) -> int:
    """Sums up and syncs all files of the folder, writes the manifest; returns the bytes of the files."""
    files = {name: file_sum(folder / name, sync=True) for name in list_files(folder)}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **fields,
        "state_hash": hash_records(records),
        "tree": {
            n: {"dtype": r.dtype, "shape": list(r.shape), "sha256": r.sha256} for n, r in records.items()
        },
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
    }
    manifest["digest"] = _digest(manifest)
    write_atomic(folder / NAME, json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return sum(size for size, _ in files.values())


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of one checkpoint folder; Damaged if it is missing, torn or altered."""
    path = Path(folder) / NAME
    try:
        manifest = json.loads(path.read_bytes())
        intact = manifest["digest"] == _digest(manifest)
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME} is damaged") from error
    if not intact:
        raise Damaged(f"{NAME} was altered")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path}: written by a newer smart_grpo_jax (format {manifest['format']}, "
            f"this one reads {FORMAT}); update the package"
        )
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises Damaged, naming the first file that is not as it was written."""
    for name, want in manifest["files"].items():
        try:
            size, digest = file_sum(folder / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        if size != want["bytes"]:
            raise Damaged(f"{name} has {size} bytes, want {want['bytes']}")
        if digest != want["sha256"]:
            raise Damaged(f"{name} has another sha256 than when it was written")


def records_of(manifest: dict[str, Any], part: str | None = None) -> dict[str, LeafRecord]:
    """The arrays of the state, or of the subtree `part` with the prefix taken off."""
    records = {
        name: LeafRecord(row["dtype"], tuple(row["shape"]), row["sha256"])
        for name, row in manifest["tree"].items()
    }
    if part is None:
        return records
    return {n.removeprefix(f"{part}/"): r for n, r in records.items() if n.startswith(f"{part}/")}


def check_like(where: str, records: dict[str, LeafRecord], like: dict[str, Any]) -> None:
    """Raises a UserError naming the first leaf that the checkpoint and the wanted tree do not share."""
    for name in sorted(records.keys() | like.keys()):
        if name not in like:
            raise UserError(f"{where}: {name}: stored {records[name].kind}, this run has no such array")
        want = LeafRecord(str(like[name].dtype), tuple(like[name].shape), "")
        if name not in records:
            raise UserError(f"{where}: {name}: not stored, this run wants {want.kind}")
        if records[name].kind != want.kind:
            raise UserError(f"{where}: {name}: stored {records[name].kind}, this run wants {want.kind}")
