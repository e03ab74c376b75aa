"""A process that hangs ends itself and all that wait for it: alive but stuck, it would hold them up for ever.

Alone, a process has one clock: a phase that lasts longer than `deadline` ends it. Of several, each tells the
others where it stands (company.py), over a line of its own and not through the collectives, which are what
hangs. A process that died, was stopped, or sleeps while the others wait for it is named by rank, host, phase
and step, in one line that every survivor says before it exits with code 75. `company.judge` has the rule.

A place is passed with `phase` (on entering and on leaving) and with `mark`, which distributed.py calls in
front of every program and every exchange in which the main thread may wait for others. All processes pass
the same places in the same order; so whoever has passed fewer is behind, and whoever waits in a collective
is not.

A stopped process that is continued finds the verdict in its line, or the line broken: it leaves with 75 too.
An exception in one of several processes ends all: the others hear of it before the collectives break.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import jax

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.company import GO_ON, Beat, Company, Limits, Verdict, short
from smart_grpo_jax.runtime.files import write_atomic

COMPILING = 10.0
"""How many times longer one of several processes may be behind, or all be in one place, in a phase that is
entered for the first or second time: programs are compiled, by one what others found in a cache."""

SETTLE_SECONDS = 3.0
"""An exception waits so long before it is told: the death of another process is often its cause, and is named
by the watchdog meanwhile."""

RETURNED_SECONDS = 10.0
"""After a process stood still, what it finds amiss is its own doing for so long."""


class Phase(NamedTuple):
    """What the process does, since when (monotonic and wall clock), and whether the deadline holds for it."""

    name: str
    step: int
    since: float
    wall: float
    limited: bool = True


class Watchdog:
    """A thread that knows the current phase, writes it to phase.json, and ends the process when it must.

    `deadline` is for a phase (0: never); `silence` and `lag` are for the other processes, and never longer
    than a deadline. The time of an outer phase starts anew when an inner one ends. The thread writes
    phase.json, at most once per second and on the main process only: to enter a phase costs the loop a
    message among several processes, and alone nothing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        host: str | int,
        deadline: float,
        *,
        silence: float = 60.0,
        lag: float = 0.0,
    ) -> None:
        self._path = Path(folder) / "phase.json"
        self._host, self._deadline = host, float(deadline)
        silence, lag = (float(min(clock or deadline, deadline or clock)) for clock in (silence, lag))
        self._limits = Limits(silence, lag, float(deadline))
        self._phase: Phase | None = None
        self._written: Phase | None = None
        self._writes = distributed.is_main()
        self._beat, self._passed = Beat(), time.monotonic()
        self._entered: Counter[str] = Counter()
        self._stood = (-RETURNED_SECONDS, 0.0)
        self._stop, self._woken = threading.Event(), threading.Event()
        count, rank = jax.process_count(), jax.process_index()
        self._company = Company(rank, count, self._woken.set) if count > 1 else None
        self._forget = distributed.before_waiting(self.mark)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def phase(self, name: str, step: int, limited: bool = True) -> Iterator[None]:
        """The body is the phase `name` of this step."""
        outer = self._phase
        self._phase = Phase(name, int(step), time.monotonic(), time.time(), limited)
        self._entered[name] += 1
        self._pass(self._phase)
        if self._company is not None:  # at once: whoever dies in its first instant dies in this phase
            self._company.tell(beat=self._beat)
        try:
            yield
        finally:
            self._phase = outer and outer._replace(since=time.monotonic(), wall=time.time())
            self._pass(self._phase)

    def mark(self) -> None:
        """A place that all processes pass in the same order; in front of what waits for others."""
        if self._phase is not None:
            self._phase = self._phase._replace(since=time.monotonic(), wall=time.time())
        self._pass(self._phase)

    def _pass(self, phase: Phase | None) -> None:
        old = self._beat
        name, step = (phase.name, phase.step) if phase else (old.phase, old.step)
        stretch = COMPILING if self._entered[name] <= 2 else 1.0
        self._passed = time.monotonic()
        timed = phase is not None and phase.limited
        self._beat = Beat(old.position + 1, name, step, phase is not None, timed, 0.0, stretch)

    def close(self) -> None:
        """Ends the watch."""
        if not self._stop.is_set():
            self._forget()
        self._stop.set()
        self._woken.set()
        self._thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._company is not None:
            if isinstance(error, Exception):
                self._leave(error)
            elif error is None:
                distributed.gather(None)  # nobody goes before all are done
            self._company.tell(left=(0, ""))
        self.close()

    def _leave(self, error: Exception) -> None:
        """Ends one of several processes: at the exit jax would wait for the others, who wait for this one."""
        assert self._company is not None
        time.sleep(SETTLE_SECONDS)
        user = isinstance(error, UserError)
        line = error.line if user else short(f"{type(error).__name__}: {' '.join(str(error).split())}")
        if not user:
            traceback.print_exception(error)
        code = error.exit_code if user else 1
        self._company.tell(left=(code, line))
        self._end(Verdict(line, code))

    def _watch(self) -> None:
        clocks = [clock / 4 for clock in (self._deadline, self._limits.lag) if clock > 0]
        if self._company is not None:
            clocks.append(self._limits.silence / 5)
        pause, ticked, written = min(1.0, *clocks, 1.0), time.monotonic(), -1.0
        while True:
            self._woken.wait(pause)
            self._woken.clear()
            if self._stop.is_set():
                return
            now = time.monotonic()
            gap, ticked, phase = now - ticked, now, self._phase
            if self._writes and phase is not None and phase != self._written and now - written >= 1.0:
                self._write(phase)
                written = now
            if self._company is None:
                self._alone(phase)
            else:
                self._among_others(self._company, gap)

    def _alone(self, phase: Phase | None) -> None:
        seconds = time.monotonic() - phase.since if phase is not None else 0.0
        if phase is not None and phase.limited and 0 < self._deadline < seconds and phase is self._phase:
            self._end(
                Verdict(
                    f"host {self._host}: phase {phase.name} of step {phase.step} has taken {seconds:.0f} s, "
                    f"more than {self._deadline:g} s; ending ({GO_ON})"
                )
            )

    def _among_others(self, company: Company, gap: float) -> None:
        now = time.monotonic()
        if gap > self._limits.silence:
            self._stood = now, gap
            company.forgive()
        own = self._beat._replace(age=now - self._passed)
        company.tell(beat=own)
        verdict = company.judged(own, self._limits)
        if verdict is None:
            return
        stood_at, seconds = self._stood
        if company.verdict is None and now - stood_at < RETURNED_SECONDS:
            verdict = Verdict(
                f"{company.name} stood still for {seconds:.0f} s {own.where}, and the others have ended "
                f"without it; ending ({GO_ON})"
            )
        elif company.rank == 0:
            company.tell(verdict=verdict)
        self._end(verdict)

    def _write(self, phase: Phase) -> None:
        self._written = phase
        row = {"host": self._host, "pid": os.getpid(), "phase": phase.name, "step": phase.step}
        with contextlib.suppress(StorageError):  # a full disk must not end the watch
            write_atomic(self._path, json.dumps({**row, "since": phase.wall}) + "\n")

    def _end(self, verdict: Verdict) -> None:
        # The stuck thread may hold a stream's lock, and the disk may be what it is stuck on.
        last_words = threading.Thread(target=self._last_words, args=(self._phase,), daemon=True)
        last_words.start()
        last_words.join(2.0)
        with contextlib.suppress(OSError):
            os.write(2, f"{short(verdict.line)}\n".encode())
        os._exit(verdict.code)

    def _last_words(self, phase: Phase | None) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if self._writes and phase is not None:
            self._write(phase)
