"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smart_grpo_jax.core.errors import StorageError


@contextlib.contextmanager
def storage(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an operating-system error on `what` into the one line that a user reads (exit 6)."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{os.fspath(what)}: {error.strerror or error}") from error


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Makes renames inside the folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Writes `data` to a temporary neighbour, syncs it, and renames it over `path`."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with storage(path):
        try:
            with open(tmp, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinity are refused, since JSON has no word for them."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def free_name(path: str | os.PathLike[str]) -> Path:
    """`path` with the smallest n ≥ 1 in the place of `{n}` that is not taken yet."""
    pattern = os.fspath(path)
    n = 1
    while os.path.lexists(candidate := pattern.replace("{n}", str(n))):
        n += 1
    return Path(candidate)


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file or a whole folder; what is already gone, or will not go, is not an error."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
