"""Checkpoints: saved while training goes on, complete or not there at all, verified when read.

A checkpoint is a folder `checkpoints/<epoch>/`: orbax's files and a manifest (`manifest.py`). It is
written as `checkpoints/tmp-<epoch>`, its manifest last, and then renamed: the one commit point
(`shelf.py`). All orbax names of the package are in this file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.files import remove
from smart_grpo_jax.runtime.manifest import (
    Damaged,
    LeafRecord,
    check_like,
    flatten,
    hash_records,
    host_copy,
    leaf_record,
    read_manifest,
    records_of,
    state_hash,
    write_manifest,
)
from smart_grpo_jax.runtime.shelf import Shelf

__all__ = ["Checkpoints", "Damaged", "Restored", "read_manifest", "state_hash"]

MISSES = 3
SYSTEM_WORDS = ("No space left on device", "Permission denied", "File too large", "Read-only file system")


class Restored(NamedTuple):
    """What a checkpoint held; `state_hash` is that of the whole state, also where a part was read."""

    epoch: int
    state: PyTree
    meta: dict[str, Any]
    state_hash: str


class Checkpoints:
    """The checkpoints of one run folder.

    The newest `keep` stay, and the one with the highest score where `best_of` names what the score is.
    `read_only` is for the folder of a run that may be alive: nothing is cleaned up, renamed or written.
    On several hosts the folder must be on a disk that all of them see.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int,
        best_of: str | None,
        say: Callable[[str], None] = print,
        read_only: bool = False,
    ) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep: got {keep}, want 1 or more")
        _silence_orbax()
        self.path = Path(folder).absolute() / "checkpoints"
        self._keep, self._best_of, self._say = keep, best_of, say
        self._shelf = Shelf(self.path, say, read_only=read_only or not distributed.is_main())
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._misses = 0
        self._given_up: str | None = None
        if not read_only and distributed.is_main():
            self._shelf.open()

    def list_epochs(self) -> list[int]:
        """The epochs of all finished checkpoints, ascending."""
        return self._shelf.epochs()

    def best_epoch(self) -> int | None:
        """The epoch with the highest score; the later of equals; None where nothing was scored."""
        return self._shelf.best()

    @distributed.waits
    def save(self, epoch: int, state: PyTree, meta: dict[str, Any], score: float | None = None) -> None:
        """Starts to write the state and returns; the caller may donate or change its arrays at once.

        A save that fails (a full disk) is reported and tried again at the next call; the third failure
        in a row is a StorageError.
        """
        self.wait()
        flat = flatten(state)
        # Copies on this host are hashed behind the loop's back; arrays spread over several hosts are
        # gathered, and therefore hashed, here.
        local = {name for name, array in flat.items() if _seen_whole(array)}
        copies = {name: host_copy(flat[name]) for name in local}
        records = {name: leaf_record(host_copy(a)) for name, a in flat.items() if name not in local}
        fields = {
            "epoch": int(epoch),
            "score": float(score) if score is not None and math.isfinite(score) else None,
            "score_of": self._best_of,
            "meta": json.loads(json.dumps(meta, allow_nan=False)),
            "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
        }
        try:
            remove(self._shelf.temporary(epoch))
            self._orbax.save(self._shelf.temporary(epoch), args=ocp.args.PyTreeSave(_storable(flat)))
        except Exception as error:
            self._missed(epoch, error)
            self._check()
            return
        job = (epoch, copies, records, fields)
        self._thread = threading.Thread(target=self._finish, args=job, name="checkpoint")
        self._thread.start()

    def _finish(
        self,
        epoch: int,
        copies: dict[str, np.ndarray],
        records: dict[str, LeafRecord],
        fields: dict[str, Any],
    ) -> None:
        try:
            records = records | {name: leaf_record(copy) for name, copy in copies.items()}
            self._orbax.wait_until_finished()
            if distributed.is_main():
                write_manifest(self._shelf.temporary(epoch), dict(sorted(records.items())), fields)
                self._shelf.commit(epoch)
                self._shelf.prune(self._keep, keep_best=self._best_of is not None)
            self._misses = 0
        except Exception as error:
            self._missed(epoch, error)

    def _missed(self, epoch: int, error: Exception) -> None:
        self._misses += 1
        self._shelf.discard(epoch)
        text = " ".join(str(error).split()) or type(error).__name__
        text = next((words for words in SYSTEM_WORDS if words in text), text[:90])
        if self.path.is_dir():
            text += f"; {shutil.disk_usage(self.path).free / 2**20:,.0f} MiB free"
        # One process of several does not know whether the others have missed it, too.
        if self._misses >= MISSES or jax.process_count() > 1:
            self._given_up = f"{self.path}: {self._misses} saves in a row failed, the last at {epoch}: {text}"
        else:
            self._say(f"WARNING: checkpoint {epoch} was not saved ({text}); the run goes on")

    def _check(self) -> None:
        if self._given_up is not None:
            raise StorageError(self._given_up)

    def wait(self) -> bool:
        """Waits for the save that is under way; whether the last one is complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._check()
        return self._misses == 0

    def close(self) -> None:
        """Waits, and lets go of orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, like: PyTree, *, epoch: int | None = None, part: str | None = None) -> Restored | None:
        """The newest good checkpoint (or that of `epoch`), laid out as `like`; None if there is none.

        `like` has arrays or `jax.ShapeDtypeStruct`s with shardings; `part` reads one subtree, such as
        `"params"`. A damaged checkpoint is renamed `<epoch>.bad-<n>` and the one before it is taken; where
        all are damaged the run must not begin afresh in silence: StorageError.
        """
        self.wait()
        flat = flatten(like)
        epochs = self._candidates(epoch)
        while True:  # every process goes round as often as the main one
            chosen = distributed.from_main(self._shelf.first_intact(epochs) if distributed.is_main() else -1)
            if chosen < 0:
                break
            manifest = read_manifest(self._shelf[chosen])
            records = records_of(manifest, part)
            check_like(f"checkpoint {chosen}", records, flat)
            arrays = self._read(chosen, flat, part)
            now = {name: leaf_record(host_copy(array)) for name, array in arrays.items()}
            if hash_records(now) == hash_records(records):
                state = jax.tree.unflatten(jax.tree.structure(like), _in_order_of(like, arrays))
                return Restored(chosen, state, manifest["meta"], manifest["state_hash"])
            wrong = next(name for name in records if now[name] != records[name])
            if distributed.is_main():
                self._shelf.set_aside(chosen, f"array {wrong} has other bytes than when it was saved")
            epochs = [e for e in epochs if e < chosen]
        if epoch is None and not self._shelf.epochs() and not self._shelf.any_bad():
            return None
        which = "every checkpoint" if epoch is None else f"checkpoint {epoch}"
        raise StorageError(
            f"{self.path}: {which} is damaged, and a run never starts afresh in silence; "
            "remove the folder, or use another --workdir"
        )

    def _candidates(self, epoch: int | None) -> list[int]:
        epochs = self._shelf.epochs()
        if epoch is None:
            return epochs
        if epoch not in epochs:
            have = ", ".join(map(str, epochs[-5:])) or "none"
            raise UserError(f"{self.path}: no checkpoint of epoch {epoch}; there are: {have}")
        return [epoch]

    def _read(self, epoch: int, like: dict[str, Any], part: str | None) -> dict[str, jax.Array]:
        """The arrays on the devices, by the names that `like` gives them."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or here)
            for name, a in like.items()
        }
        prefix = "" if part is None else f"{part}/"
        item = {prefix + name: a for name, a in _storable(wanted).items()}
        empty = {n: jnp.zeros(a.shape, a.dtype, device=a.sharding) for n, a in wanted.items() if not a.size}
        if not item:
            return empty
        request = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=part is not None,
        )
        folder = self._shelf[epoch]
        try:
            stored = self._orbax.restore(folder, args=request)
        except Exception as error:  # the files are intact, so this is no damage: do not fall back
            reason = " ".join(str(error).split())[:80]
            raise StorageError(f"{folder}: orbax {ocp.__version__} cannot read it: {reason}") from error
        return empty | {name.removeprefix(prefix): array for name, array in stored.items()}


def _in_order_of(like: PyTree, arrays: dict[str, jax.Array]) -> list[jax.Array]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]]
    return [arrays[jax.tree_util.keystr(path, simple=True, separator="/")] for path in paths]


def _seen_whole(array: Any) -> bool:
    """Whether this host has every number of the array."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


def _storable(flat: dict[str, Any]) -> dict[str, Any]:
    """Without the arrays that have no elements: orbax refuses them, and the manifest knows them."""
    return {name: leaf for name, leaf in flat.items() if math.prod(leaf.shape)}


def _silence_orbax() -> None:
    """Drops orbax's log lines; what matters of them is raised, and reported in our own words."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def save_params(path: str | os.PathLike[str], tree: PyTree) -> None:
    """A parameter tree for other users of JAX: `StandardCheckpointer().restore(path)` reads it.

    As arrays of the host: orbax ties a jax.Array to its devices and, without a target, reads it on no others.
    """
    _silence_orbax()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(Path(path).absolute(), jax.tree.map(np.asarray, tree))
    except Exception as error:
        raise StorageError(f"{path}: could not be written ({' '.join(str(error).split())[:80]})") from error


def load_params(path: str | os.PathLike[str], like: PyTree) -> PyTree:
    """What `save_params` wrote, laid out as `like`."""
    _silence_orbax()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(path).absolute(), like)
    except Exception as error:
        raise StorageError(f"{path}: cannot be read ({' '.join(str(error).split())[:80]})") from error
