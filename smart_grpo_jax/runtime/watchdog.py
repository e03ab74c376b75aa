"""A process that hangs in one phase ends itself: alive but stuck, it would hold up all the others."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from smart_grpo_jax.core.errors import PleaseRestart, StorageError
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.files import write_atomic


class Phase(NamedTuple):
    """What the process does, and since when (monotonic and wall clock)."""

    name: str
    step: int
    since: float
    wall: float


class Watchdog:
    """A thread that knows the current phase, writes it to phase.json, and ends an overlong one.

    When a phase outlasts `deadline_s` seconds (0 = never), one line names host, phase and step and the
    process exits with code 75. The time of an outer phase starts anew when an inner one ends. The
    thread writes phase.json, at most once per second and on the main process only, so that entering a
    phase costs the loop nothing.
    """

    def __init__(self, folder: str | os.PathLike[str], host: str | int, deadline_s: float) -> None:
        self._path = Path(folder) / "phase.json"
        self._host, self._deadline = host, float(deadline_s)
        self._phase: Phase | None = None
        self._written: Phase | None = None
        self._writes = distributed.is_main()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """The body is the phase `name` of this step."""
        outer = self._phase
        self._phase = Phase(name, int(step), time.monotonic(), time.time())
        try:
            yield
        finally:
            self._phase = outer and outer._replace(since=time.monotonic(), wall=time.time())

    def close(self) -> None:
        """Ends the watch."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        pause = min(1.0, self._deadline / 4) if self._deadline > 0 else 1.0
        written_at = -1.0
        while not self._stop.wait(pause):
            phase = self._phase
            if phase is None:
                continue
            if self._writes and phase != self._written and time.monotonic() - written_at >= 1.0:
                self._write(phase)
                written_at = time.monotonic()
            seconds = time.monotonic() - phase.since
            if 0 < self._deadline < seconds and phase is self._phase:
                self._end(phase, seconds)

    def _write(self, phase: Phase) -> None:
        self._written = phase
        row = {"host": self._host, "pid": os.getpid(), "phase": phase.name, "step": phase.step}
        with contextlib.suppress(StorageError):  # a full disk must not end the watch
            write_atomic(self._path, json.dumps({**row, "since": phase.wall}) + "\n")

    def _end(self, phase: Phase, seconds: float) -> None:
        line = (
            f"host {self._host}: phase {phase.name} of step {phase.step} has taken {seconds:.0f} s, "
            f"more than {self._deadline:g} s; ending (the same command goes on from the last checkpoint)"
        )
        # The stuck thread may hold a stream's lock, and the disk may be what it is stuck on.
        last_words = threading.Thread(target=self._last_words, args=(phase,), daemon=True)
        last_words.start()
        last_words.join(2.0)
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
        os._exit(PleaseRestart.exit_code)

    def _last_words(self, phase: Phase) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if self._writes:
            self._write(phase)
