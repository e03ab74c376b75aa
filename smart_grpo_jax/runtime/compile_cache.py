"""Compiled programs survive the process, and compilations can be counted."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path
from types import TracebackType

import jax

MIN_COMPILE_SECONDS = 0.3
BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def default_path() -> Path:
    """The user's cache folder, one sub-folder per kind of processor.

    XLA's CPU programs use the instructions of the machine that compiled them, and home folders are
    shared between machines.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "smart_grpo_jax" / "jax" / processor()


def processor() -> str:
    """A short name of the processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def enable(path: str | os.PathLike[str] | None = None) -> str | None:
    """Turns the persistent compilation cache on and returns its folder, or None where it cannot be.

    JAX_COMPILATION_CACHE_DIR goes before `path`, `path` before the default. Without the cache a run is
    slower to start and otherwise the same, so a folder that cannot be written is no error.
    """
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or path or default_path())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(folder)


class _Ticks:
    """The one listener of the process, however many counters there are."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == BACKEND_COMPILE
        self.seconds += duration_secs if event in (BACKEND_COMPILE, LOWERING) else 0.0


@functools.cache
def _ticks() -> _Ticks:
    return _Ticks()


def compile_seconds() -> float:
    """Seconds that this process has spent building programs since it was first asked."""
    return _ticks().seconds


class CompileCount:
    """Counts the programs built (compiled, or fetched from the cache) since it was made.

    A loop whose shapes are constant builds nothing after its second epoch: `total` must stand still.
    """

    def __init__(self) -> None:
        self._start = _ticks().count

    @property
    def total(self) -> int:
        """Programs built so far."""
        return _ticks().count - self._start

    def __enter__(self) -> CompileCount:
        self._start = _ticks().count
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
