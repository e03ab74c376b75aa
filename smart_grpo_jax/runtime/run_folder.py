"""The folder of one run: one owner, one config, and what is needed to repeat it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from smart_grpo_jax.core.errors import LockedError, StorageError, UserError
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.files import remove, storage, write_atomic, write_json

PACKAGES = ("smart_grpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
ABSENT = object()


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Every field of the config matters."""
    return config


class RunFolder:
    """An open run folder. It is locked until `close`, or until the kernel ends the process.

    Only the main process of a multi-process run locks and writes; on the others it is just a path.
    """

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        config: dict[str, Any],
        command: list[str],
        semantic: Callable[[dict[str, Any]], dict[str, Any]] = identity,
    ) -> RunFolder:
        """Creates the folder or takes up an old one.

        `semantic` keeps the part of the config that must not change within a run: the stored config and
        the new one are compared through it, and the first field that differs is a UserError.
        """
        path = Path(path).absolute()
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
        if not distributed.is_main():
            return cls(path, None)
        folder = cls(path, take_lock(path / "LOCK", command))
        try:
            folder._describe(json.loads(json.dumps(config, allow_nan=False)), command, semantic)
        except BaseException:
            folder.close()
            raise
        return folder

    def _describe(
        self, config: dict[str, Any], command: list[str], semantic: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        for leftover in self.path.glob(".*.tmp-*"):
            remove(leftover)
        old = self._old_config()
        if old is not None:
            check_same(semantic(old), semantic(config))
        if old != config:
            write_json(self.file("config.json"), config)
        record = self.file("command.txt")
        earlier = record.read_text() if record.exists() else ""
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_atomic(record, f"{earlier}{started}  {shlex.join(command)}\n")
        write_json(self.file("env.json"), environment())

    def _old_config(self) -> dict[str, Any] | None:
        path = self.file("config.json")
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: is not readable ({error}); use another --workdir") from error

    def file(self, name: str) -> Path:
        """The path of a file of the run."""
        return self.path / name

    def sub(self, name: str) -> Path:
        """A folder inside the run folder, made if it is not there."""
        path = self.path / name
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def take_lock(path: Path, command: list[str]) -> int:
    """Locks the file for this process and writes its name into it; returns the open descriptor.

    The lock is the kernel's (flock), so that it dies with its owner however the owner dies; the text in
    the file only tells others whom they met. The file is never renamed: the lock belongs to the inode.
    """
    with storage(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError(
                f"{path.parent}: {_owner(path)}; wait for it, or use another --workdir"
            ) from None
        except OSError:
            os.close(fd)
            raise
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command,
        }
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode(), 0)
        os.fsync(fd)
    return fd


def _owner(path: Path) -> str:
    """Who holds the lock; the owner writes its name just after it takes the lock, so look twice."""
    for _ in range(20):
        try:
            owner = json.loads(path.read_text())
            here = owner["host"] == socket.gethostname()
            if not here or os.path.exists(f"/proc/{owner['pid']}") or not os.path.isdir("/proc/self"):
                return f"in use by pid {owner['pid']} on {owner['host']} since {owner['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            pass
        time.sleep(0.05)
    return "in use by another process"


def check_same(old: Any, new: Any, name: str = "") -> None:
    """Raises on the first field, in dotted form, in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            check_same(old.get(key, ABSENT), new.get(key, ABSENT), f"{name}.{key}" if name else key)
    elif old is ABSENT or new is ABSENT or old != new or isinstance(old, bool) != isinstance(new, bool):
        was, now = ("nothing" if v is ABSENT else json.dumps(v) for v in (old, new))
        raise UserError(
            f"{name or 'config'}: this run was started with {was}, got {now}; "
            "use another --workdir or the old value"
        )


def environment() -> dict[str, Any]:
    """The versions, devices and sources that this process runs on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": devices[0].platform,
        "devices": [f"{d.id}: {d.device_kind}" for d in devices],
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "git": git_commit(Path(__file__).parent),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout this code lies in, `+changes` if it was edited; None outside of one.

    The file must be tracked: an environment inside somebody else's checkout is not that checkout.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return None
