"""metrics.jsonl: one JSON object per call, equal bytes for equal numbers; TensorBoard follows it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.events import Events
from smart_grpo_jax.runtime.files import free_name, storage, write_atomic
from smart_grpo_jax.runtime.progress import say as print_line

NAME = "metrics.jsonl"


def encode(epoch: int, step: int, scalars: Mapping[str, float]) -> str:
    """One line: `epoch` and `step`, then the names in order. Floats are written by `repr`.

    JSON has no NaN: such a value is null, and `<name>/nonfinite` says so.
    """
    row: dict[str, Any] = {}
    for name, value in scalars.items():
        if isinstance(value, (bool, int, np.integer, np.bool_)):
            row[name] = int(value)
        elif math.isfinite(number := float(value)):
            row[name] = number
        else:
            row[name], row[f"{name}/nonfinite"] = None, True
    return json.dumps({"epoch": int(epoch), "step": int(step), **dict(sorted(row.items()))}, allow_nan=False)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file (or of the run folder it lies in); damaged lines are passed over.

    A run that is being written, or was killed, may end in half a line.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.exists():
        return []
    with storage(path):
        rows = [_parse(line) for line in path.read_bytes().splitlines()]
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("epoch"), int) else None


def cut_back(path: Path, resume_epoch: int | None) -> Path | None:
    """Moves what the restored run has not lived through to `metrics.lost-<n>.jsonl`; returns that file.

    These are the lines of later epochs and damaged ones; all lines where the run starts afresh (None).
    """
    with storage(path):
        data = path.read_bytes() if path.exists() else b""
    last = -1 if resume_epoch is None else resume_epoch
    kept: list[bytes] = []
    lost: list[bytes] = []
    for line in data.splitlines(keepends=True):
        row = _parse(line)
        good = row is not None and row["epoch"] <= last and line.endswith(b"\n")
        (kept if good else lost).append(line)
    if not lost:
        return None
    target = free_name(path.with_name("metrics.lost-{n}.jsonl"))
    write_atomic(target, b"".join(lost))
    write_atomic(path, b"".join(kept))
    return target


class MetricLog:
    """Appends to metrics.jsonl and, if wanted, to TensorBoard; a line is on disk when `write` returns.

    `resume_epoch` is the epoch of the restored checkpoint, None for a fresh start; on opening the file
    is cut back to it (`cut_back`). Only the main process writes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        tensorboard: bool,
        resume_epoch: int | None,
        say: Callable[[str], None] = print_line,
    ) -> None:
        self.path = Path(folder) / NAME
        self._file = None
        self._events: Events | None = None
        if not distributed.is_main():
            return
        self.lost = cut_back(self.path, resume_epoch)
        with storage(self.path):
            self._file = open(self.path, "ab", buffering=0)
        if tensorboard:
            self._events = Events(Path(folder) / "tensorboard", read(self.path), say)

    def write(self, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line."""
        if self._file is None:
            return
        line = encode(epoch, step, scalars)
        with storage(self.path):
            self._file.write(line.encode() + b"\n")
            os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.scalars(json.loads(line))

    def images(self, epoch: int, name: str, images: np.ndarray) -> None:
        """Shows images[n,H,W,3] in [0,1] on TensorBoard; the files under samples/ are the record."""
        if self._events is not None:
            self._events.images(epoch, name, np.asarray(images))

    def state_lines(self) -> list[dict[str, Any]]:
        """The rows written so far, those before a restart included."""
        return read(self.path)

    def close(self) -> None:
        """Closes the file, and lets TensorBoard catch up."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
