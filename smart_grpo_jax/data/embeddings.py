"""Prompt embeddings, computed once and kept on disk by prompt and fingerprint of the encoders.

A folder holds immutable part files (array_record), one per batch that was encoded. A part appears under
its name by a rename, so that any number of processes may share a folder without locks, and a killed
writer leaves nothing that anyone reads. The first record of a part lists its prompts, so that a large
cache is indexed without reading it; each other record is a JSON header and the raw bytes of its arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import ml_dtypes as ml_dtypes  # gives numpy the name "bfloat16"
import numpy as np

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.core.types import Conditioning, negative_of
from smart_grpo_jax.runtime.progress import duration, say

PARTS, SUFFIX = "part-", ".array_record"
STALE = 86_400.0
"""Seconds after which a temporary file belongs to nobody."""

FIELDS = ("tokens", "pooled")

READING = "readahead_buffer_size:0,max_parallelism:0"
"""Single records, not whole files."""

Encode = Callable[[Sequence[str]], Conditioning]


class Row(NamedTuple):
    """The embedding of one prompt, on the host."""

    tokens: np.ndarray
    pooled: np.ndarray
    repeats: int


class Spot(NamedTuple):
    """Where a row lies on disk."""

    file: Path
    index: int


class Embeddings:
    """Rows by prompt. `folder` None keeps them in memory alone.

    `negative` is given where some prompt has a negative prompt of its own: it stands for those that have
    none.
    """

    def __init__(
        self,
        encode: Encode,
        fingerprint: str,
        folder: Path | None,
        batch: int = 8,
        negative: str | None = None,
    ) -> None:
        self._encode: Encode | None = encode
        self._folder = folder / fingerprint if folder is not None else None
        self._batch = batch
        self._negative = negative
        self._memory: dict[str, Row] = {}
        self._disk: dict[str, Spot] = {}
        self._seen: set[Path] = set()

    def ensure(self, prompts: Iterable[str]) -> int:
        """Encode what is missing; how many prompts were encoded here.

        Processes that share a folder begin at different places and skip what has appeared meanwhile; none
        waits for another, since nothing says that the others see the same disk.
        """
        self._refresh()
        missing = self._missing(dict.fromkeys(prompts))
        begin = jax.process_index() * len(missing) // jax.process_count()
        left, count = missing[begin:] + missing[:begin], 0
        started = told = time.monotonic()
        while left:
            self._add(left[: self._batch])
            count += min(self._batch, len(left))
            self._refresh()
            left = self._missing(left)
            now = time.monotonic()
            if now - told > 10 and left:
                told = now
                rest = duration((now - started) / (len(missing) - len(left)) * len(left))
                say(f"embedding prompts: {len(missing) - len(left):,} of {len(missing):,}, {rest} left")
        return count

    def _missing(self, prompts: Iterable[str]) -> list[str]:
        return [p for p in prompts if p not in self._memory and p not in self._disk]

    def rows(self, prompts: Sequence[str]) -> Conditioning:
        """The embeddings of these prompts (at least one), in this order; numpy arrays."""
        found = [self._row(prompt) for prompt in prompts]
        tokens, pooled = (np.stack([getattr(row, name) for row in found]) for name in FIELDS)
        return Conditioning(cast(Any, tokens), cast(Any, pooled), found[0].repeats)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The rows of these prompts, with those of their negative prompts where there are such."""
        cond = self.rows(prompts)
        if self._negative is None:
            return cond
        negative = self.rows([negative_of(prompt, self._negative) for prompt in prompts])
        return dataclasses.replace(cond, negative=negative)

    def release(self) -> None:
        """Let go of the encoders."""
        self._encode = None

    def _row(self, prompt: str) -> Row:
        if prompt in self._memory:
            return self._memory[prompt]
        if prompt not in self._disk:
            raise UserError(f"embeddings: {prompt!r} was not among the prompts that were embedded")
        header, row = read_record(self._disk[prompt])
        if header["prompt"] != prompt:
            raise StorageError(f"{self._disk[prompt].file}: has changed since it was opened")
        return row

    def _add(self, prompts: Sequence[str]) -> None:
        """Encode one batch, filled up to its fixed shape so that a row never depends on its neighbours."""
        if self._encode is None:
            raise UserError("embeddings: the encoders have been released")
        filled = [*prompts, *[""] * (self._batch - len(prompts))]
        cond = self._encode(filled)
        tokens, pooled = np.asarray(cond.tokens), np.asarray(cond.pooled)
        rows = {p: Row(tokens[i], pooled[i], cond.repeats) for i, p in enumerate(prompts)}
        if self._folder is None:
            self._memory |= rows
        else:
            file = write_part(self._folder, rows)
            self._seen.add(file)
            self._disk |= {prompt: Spot(file, i) for i, prompt in enumerate(rows, 1)}

    def _refresh(self) -> None:
        """Look at parts that have appeared."""
        if self._folder is None or not self._folder.is_dir():
            return
        for file in sorted(self._folder.iterdir()):
            if file.name.startswith("."):
                with contextlib.suppress(OSError):  # it may become a part under our eyes
                    if time.time() - file.stat().st_mtime > STALE:
                        file.unlink()
            elif file.name.startswith(PARTS) and file.suffix == SUFFIX and file not in self._seen:
                self._seen.add(file)
                self._disk |= {prompt: Spot(file, i) for i, prompt in enumerate(prompts_of(file), 1)}


def array_record() -> Any:
    """The library, imported where it is used; an extension module without annotations, built for Linux."""
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError as error:
        raise UserError("prompts.cache: array_record is not installed here, wanted off") from error


def write_part(folder: Path, rows: dict[str, Row]) -> Path:
    """One part file, complete when it appears."""
    name = f"{os.getpid()}-{uuid.uuid4().hex}"
    temporary, file = folder / f".{name}{SUFFIX}", folder / f"{PARTS}{name}{SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer = array_record().ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        writer.write(json.dumps(list(rows)).encode())
        for prompt, row in rows.items():
            writer.write(record(prompt, row))
        writer.close()
        os.replace(temporary, file)
    except (OSError, RuntimeError, ValueError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"{folder}: embeddings could not be written ({error})") from error
    return file


def record(prompt: str, row: Row) -> bytes:
    """Length of the header, header, bytes of the arrays."""
    arrays = [np.ascontiguousarray(getattr(row, name)) for name in FIELDS]
    body = b"".join(array.tobytes() for array in arrays)
    header = {
        "prompt": prompt,
        "repeats": row.repeats,
        "arrays": [[array.dtype.name, list(array.shape)] for array in arrays],
        "crc": zlib.crc32(body),
    }
    head = json.dumps(header).encode()
    return len(head).to_bytes(4, "little") + head + body


def prompts_of(file: Path) -> list[str]:
    """The prompts of a part, in order; none, and a line, where the file is no whole part."""
    try:
        reader = array_record().ArrayRecordReader(str(file), READING)
        found, count = json.loads(reader.read([0])[0]), reader.num_records()
        reader.close()
        if not all(isinstance(prompt, str) for prompt in found) or count != len(found) + 1:
            raise ValueError(f"{count} records for {len(found)} prompts")
    except Exception as error:  # whatever the library makes of damaged bytes
        say(f"WARNING: {file} is damaged and is not used ({' '.join(str(error).split())[:80]})")
        return []
    return found


def read_record(spot: Spot) -> tuple[dict[str, Any], Row]:
    """One record of a part."""
    try:
        reader = array_record().ArrayRecordReader(str(spot.file), READING)
        raw = reader.read([spot.index])[0]
        reader.close()
        return parse(raw)
    except Exception as error:
        reason = " ".join(str(error).split())[:60]
        raise StorageError(f"{spot.file}: is damaged ({reason}); remove it and start again") from error


def parse(raw: bytes) -> tuple[dict[str, Any], Row]:
    """Header and arrays of a record; ValueError where they do not fit each other."""
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length])
    body, start, arrays = raw[4 + length :], 0, []
    if zlib.crc32(body) != header["crc"]:
        raise ValueError("a record has other bytes than when it was written")
    for dtype, shape in header["arrays"]:
        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(body, kind, count, start).reshape(shape))
        start += count * kind.itemsize
    tokens, pooled = arrays
    if not isinstance(header["prompt"], str):
        raise ValueError("a record has no prompt")
    return header, Row(tokens, pooled, int(header["repeats"]))
