"""`--mode=experiment`: all runs of an experiment, one after the other, in a process beside this one.

What is finished is skipped, what was begun is taken up where it stopped, what fails is told at the end and
does not end the others: after a failure a fresh process goes on. Several of these, on one machine or on
several that share the folder, work on one list: each run is locked by who works on it. When all is there,
compare.html is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from smart_grpo_jax.core.errors import LockedError, PleaseRestart, UserError
from smart_grpo_jax.jobs import compare, compare_runs, experiment_list
from smart_grpo_jax.jobs.experiment_list import PRICE, Line
from smart_grpo_jax.runtime.files import write_json
from smart_grpo_jax.runtime.progress import duration, say, table
from smart_grpo_jax.runtime.run_folder import take_lock

RESTART = PleaseRestart.exit_code
"""The exit code of a run that wants its command again."""
TRIES = 3
"""How often a run may ask for that."""
START = 45.0
"""Seconds until a run of the embedded world has loaded and compiled, beside what it computes."""
LOG = "log.txt"
"""What a run printed, in its folder."""
LOOK_AGAIN = 15.0
"""Seconds between two looks at runs that others work on."""

Calls = dict[str, int]


@dataclasses.dataclass
class Clock:
    """Seconds per weighted call: as measured, then as the runs of this process take."""

    per_call: Mapping[str, float]
    unit: float | None = None
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    work: float = 0.0

    def cost(self, line: Line) -> float:
        """A run's weighted calls."""
        return compare_runs.weighted(experiment_list.total(line, self.known), self.per_call)

    def add(self, line: Line, share: float, seconds: float) -> None:
        """A run, or the share of it that was left, took so long."""
        self.seconds, self.work = self.seconds + seconds, self.work + share * self.cost(line)

    def left(self, lines: Sequence[Line]) -> str:
        """The time that these will take, in words."""
        costs = sum(self.cost(line) for line in lines)
        if self.work > 0:
            return f"about {duration(costs * self.seconds / self.work)} left"
        if self.unit is not None:
            return f"about {duration(costs * self.unit + len(lines) * START)} left"
        return "time unknown until the first run is done"


def job(
    path: str,
    words: str,
    workdir: Path,
    *,
    seeds: int | None,
    first: int,
    arms: Sequence[str] = (),
    overrides: Sequence[tuple[str, str]],
    dry: bool = False,
    costs: str | None = None,
    results: str | None = None,
) -> None:
    """Run what is missing of an experiment, and compare. Runs that `results` holds are not missing; those
    that are made are stored there, too."""
    found = experiment_list.read(path)
    _, size = found.words(words)
    name = Path(path).stem + ("" if size == "shapes" else f"-{size}")
    chosen = range(first, first + (seeds or found.seeds))
    lines = experiment_list.lines(found, name, size, list(chosen), workdir, overrides, arms)
    if results and found.audit:
        raise UserError(f"--results: got {results}, wanted none for {name}, which leaves audit.json files")
    runs, stored = experiment_list.held(Path(results), lines) if results else ([], set())
    per_call, origin = compare.prices(costs, [str(workdir)])
    measured = compare.seconds_per_call(costs, [str(workdir)])
    clock = Clock(per_call, measured[0]["velocity"] if measured else None)
    say(f"{name}: {found.question}")
    say(listing(lines, clock, stored))
    say(f"cost in network calls ({origin})")
    if dry:
        return
    with interruptible(), Worker() as worker:
        missing = [line for line in lines if line.folder not in stored]
        failures = work(
            missing, clock, lambda line: worker.run(line.folder, arguments(path, line, overrides))
        )
    finished = [line for line in missing if line.finished()]
    for line in finished:
        if not (line.folder / PRICE).is_file():
            write_json(line.folder / PRICE, experiment_list.price(line.config))
    if found.audit:
        for line in finished:
            say(f"look at {experiment_list.join(line)}")
    elif finished or runs:
        folders = [str(experiment_list.join(line)) for line in finished]
        there = found.against in {*(line.arm for line in finished), *(run.arm for run in runs)}
        against, out = found.against if there else None, str(workdir / name)
        compare.job(folders, runs=runs, against=against, costs=costs, out=out, results=results)
    if failures:
        raise UserError(f"{name}: {len(failures)} of {len(lines)} runs failed: {'; '.join(failures)}")


def listing(lines: Sequence[Line], clock: Clock, stored: Collection[Path] = ()) -> str:
    """What there is to run, arm by arm; the runs of the folders in `stored` are at hand."""
    rows = []
    for arm in dict.fromkeys(line.arm for line in lines):
        here = [line for line in lines if line.arm == arm]
        state = {"finished": 0, "begun": 0, "to do": 0}
        for line in here:
            begun = "begun" if line.epochs_done() else "to do"
            state["finished" if line.folder in stored or line.finished() else begun] += 1
        calls = experiment_list.total(here[0], clock.known)
        rows.append(
            [
                arm,
                str(len(here)),
                ", ".join(f"{n} {what}" for what, n in state.items() if n),
                str(here[0].config.train.epochs),
                *(f"{calls[n]:,}" for n in ("velocity", "backward", "decode")),
                f"{clock.cost(here[0]):.3g}",
            ]
        )
    head = ["arm", "runs", "state", "epochs", "network calls", "backward", "decodes", "cost of a run"]
    left = [line for line in lines if line.folder not in stored and not line.finished()]
    cost = sum(clock.cost(line) for line in left)
    return table(rows, head) + f"\n{len(lines)} runs, cost of what is left: {cost:.3g}, {clock.left(left)}"


def work(lines: Sequence[Line], clock: Clock, run: Callable[[Line], int]) -> list[str]:
    """`run` whatever is neither finished nor in another's hands, until all is finished or has failed."""
    failures: list[str] = []
    pending = list(lines)
    waiting = False
    while pending:
        before = len(pending)
        for line in list(pending):
            experiment_list.join(line)
            with owned(line) as mine:
                if not mine and not line.finished():
                    continue
                pending.remove(line)
                if mine and not line.finished():
                    failures += one(line, clock, run, pending)
        if pending and len(pending) == before:
            if not waiting:
                say(f"waiting for {len(pending)} runs that others work on")
            waiting = True
            time.sleep(LOOK_AGAIN)
    return failures


def one(line: Line, clock: Clock, run: Callable[[Line], int], pending: Sequence[Line]) -> list[str]:
    """One run; what went wrong, if anything."""
    say(f"{line.name}: {clock.left([line, *pending])}; log: {line.folder / LOG}")
    already = line.epochs_done()
    started = time.monotonic()
    code = RESTART
    for _ in range(TRIES):
        code = run(line)
        if code != RESTART:
            break
    if code == 0 and line.finished():
        epochs = max(1, line.config.train.epochs)
        clock.add(line, 1 - already / epochs, time.monotonic() - started)
        return []
    why = f"{line.name}: exit {code}, {last_line(line.folder / LOG)}"
    say(f"FAILED {why}")
    return [why]


class Worker:
    """A process that runs one command after the other; a fresh one after any that did not end well."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "smart_grpo_jax.worker")) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, folder: Path, argv: Sequence[str]) -> int:
        """The exit code of a command whose output goes to the run's log; an interruption is handed on and
        waited for."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps({"argv": list(argv), "log": str(folder / LOG)}), file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            say("stopping: the run saves its state")
            process.stdout.readline()
            self.close()
            raise PleaseRestart("interrupted; the same command goes on where it stopped") from None
        if answer == "0\n":
            return 0
        ended = self.close()
        return int(answer) if answer else ended

    def close(self) -> int:
        """End the process; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.communicate()
        return process.returncode


def arguments(path: str, line: Line, overrides: Sequence[tuple[str, str]]) -> list[str]:
    """What trains one line: the entry point's arguments, as a user would type them."""
    mode = ["--mode=rewards", "--audit"] if line.audit else []
    return [
        *(f"--config={path}:{line.words}", *mode),
        f"--workdir={line.folder}",
        *(f"--config.{name}={value}" for name, value in overrides),
        f"--config.seed={line.seed}",
        f"--config.train.epochs={line.config.train.epochs}",
    ]


@contextlib.contextmanager
def owned(line: Line) -> Iterator[bool]:
    """Whether this process has the run for itself."""
    line.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(line.folder / "RUNNER", ["--mode=experiment"])
    except LockedError:
        yield False
        return
    try:
        yield True
    finally:
        os.ftruncate(lock, 0)
        os.close(lock)


def last_line(path: Path) -> str:
    """What a failed run said at its end."""
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the list as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
