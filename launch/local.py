#!/usr/bin/env python3
"""Several processes on this machine's CPU, joined the way the hosts of a pod are.

    launch/local.py --processes 4 --devices-per-process 2 -- --config=configs/shapes.py --workdir=runs/four

Every process runs `python -m smart_grpo_jax.main` with the same arguments. They find each other through
SGRPO_COORDINATOR, SGRPO_PROCESSES and SGRPO_PROCESS_ID, which runtime/distributed.py reads.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parents[1]
MAIN = "smart_grpo_jax.main"
DEVICE_COUNT = "--xla_force_host_platform_device_count"
PR_SET_PDEATHSIG = 1
PLEASE_RESTART = 75


def main(argv: Sequence[str]) -> int:
    """Start the processes, or print what would be started; returns the exit code."""
    asked = parse(argv)
    port = asked.port or free_port()
    command = [sys.executable, "-m", asked.module, *asked.arguments]
    settings = [
        settings_of(rank, asked.processes, port, asked.devices_per_process, os.environ)
        for rank in range(asked.processes)
    ]
    if asked.dry_run:
        for own in settings:
            print(dry_line(own, command))
        return 0
    return Job(command, settings, asked.grace).run()


class Job:
    """The running processes, the threads that copy their output, and the rule for ending them."""

    def __init__(self, command: Sequence[str], settings: Sequence[Mapping[str, str]], grace: float) -> None:
        self.command, self.settings, self.grace = command, settings, grace
        self.children: list[subprocess.Popen[bytes]] = []
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.writing = threading.Lock()

    def run(self) -> int:
        """Until every process has ended; the first exit code that is not 0 is the job's."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.forward)
        try:
            self.start()
            return self.follow()
        finally:
            self.signal_all(signal.SIGKILL)

    def start(self) -> None:
        """All processes before any thread: between fork and exec a child must not meet a held lock."""
        inherited = {name: v for name, v in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
        prctl = getattr(ctypes.CDLL(None), "prctl", None)

        def end_with_launcher() -> None:
            if prctl is not None:
                prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

        for own in self.settings:
            # A session of its own: the terminal's Ctrl-C reaches a process once, through `forward`.
            child = subprocess.Popen(
                self.command,
                env={**inherited, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=end_with_launcher,
            )
            self.children.append(child)
        for rank, child in enumerate(self.children):
            threading.Thread(target=self.attend, args=(rank, child), daemon=True).start()

    def attend(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        """Copies the output of one process and reports its end."""
        assert child.stdout is not None and child.stderr is not None
        copies = [
            threading.Thread(target=self.copy, args=(rank, source, sink), daemon=True)
            for source, sink in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
        ]
        for thread in copies:
            thread.start()
        code = child.wait()
        for thread in copies:
            # A grandchild may hold the pipe open; the process itself has said all it will say.
            thread.join(timeout=2.0)
        self.ended.put((rank, exit_code(code)))

    def copy(self, rank: int, source: IO[bytes], sink: IO[bytes]) -> None:
        """Every line with its rank in front; goes on reading when nobody listens any more."""
        for line in source:
            try:
                with self.writing:
                    sink.write(b"[%d] %s\n" % (rank, line.rstrip(b"\r\n")))
                    sink.flush()
            except (BrokenPipeError, ValueError):
                continue

    def follow(self) -> int:
        """Waits for all; after a first failure the others get the grace period, then SIGTERM, SIGKILL.

        The first failure is the job's, but where a signal ended that process, and another says that the same
        command goes on (75), that is the answer.
        """
        first: tuple[int, int] | None = None
        restart: tuple[int, int] | None = None
        deadlines: list[tuple[float, signal.Signals]] = []
        running = len(self.children)
        while running:
            try:
                rank, code = self.ended.get(timeout=0.1)
                running -= 1
            except queue.Empty:
                code = rank = 0
            if code == PLEASE_RESTART and restart is None:
                restart = (rank, code)
            if code and first is None:
                first = (rank, code)
                now = time.monotonic()
                deadlines = [(now + self.grace, signal.SIGTERM), (now + 2 * self.grace, signal.SIGKILL)]
                if running:
                    self.say(
                        f"process {rank} ended with exit code {code}; {running} others have {self.grace:g} s"
                    )
            elif code:
                self.say(f"process {rank} ended with exit code {code}")
            while deadlines and running and time.monotonic() >= deadlines[0][0]:
                _, number = deadlines.pop(0)
                self.say(f"{running} still running: {number.name}")
                self.signal_all(number)
        if first is None:
            return 0
        if first[1] >= 128 and restart is not None:
            first = restart
        self.say(f"exit code {first[1]}, from process {first[0]}")
        return first[1]

    def forward(self, number: int, frame: FrameType | None) -> None:
        """A signal to the launcher is a signal to every process."""
        self.signal_all(signal.Signals(number))

    def signal_all(self, number: signal.Signals) -> None:
        """Sends the signal to the processes that still run; SIGKILL also reaches what they started."""
        for child in self.children:
            if child.returncode is not None:
                continue
            try:
                (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)
            except ProcessLookupError:
                continue

    def say(self, text: str) -> None:
        """One line of the launcher's own."""
        with self.writing:
            print(f"[launcher] {text}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """The mistake, and exit code 2."""
        sys.exit(refuse(message))


def refuse(message: str) -> int:
    """Says in one line what is wrong; the exit code of a user's mistake."""
    print(f"launch/local.py: {message}", file=sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The launcher's own options, and everything after `--` as the program's arguments."""
    parser = Parser(
        prog="launch/local.py",
        description=(__doc__ or "").split("\n\n")[0],
        usage="launch/local.py --processes N [options] -- --config=FILE [arguments of smart_grpo_jax.main]",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=positive, required=True, help="how many processes")
    parser.add_argument("--devices-per-process", type=positive, default=1, help="CPU devices of each (1)")
    parser.add_argument(
        "--grace", type=seconds, default=60.0, help="seconds the others get when one fails (60)"
    )
    parser.add_argument("--port", type=positive, default=0, help="of the coordinator (a free one)")
    parser.add_argument("--module", default=MAIN, help=f"what each process runs ({MAIN})")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    asked = parser.parse_args(words[:cut])
    asked.arguments = words[cut + 1 :]
    if not asked.arguments and asked.module == MAIN:
        parser.error(
            "nothing after --, wanted the arguments of the program (try -- --config=configs/shapes.py)"
        )
    return asked


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a whole number ≥ 1")
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, wanted seconds ≥ 0")
    return value


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings_of(rank: int, processes: int, port: int, devices: int, env: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that one process gets on top of the launcher's own.

    The coordinator listens on this machine only. A device count that XLA_FLAGS held before is replaced.
    """
    kept = [flag for flag in env.get("XLA_FLAGS", "").split() if flag.split("=")[0] != DEVICE_COUNT]
    path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return {
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "SGRPO_COORDINATOR": f"127.0.0.1:{port}",
        "SGRPO_PROCESSES": str(processes),
        "SGRPO_PROCESS_ID": str(rank),
        "XLA_FLAGS": " ".join([*kept, f"{DEVICE_COUNT}={devices}"]),
    }


def dry_line(own: Mapping[str, str], command: Sequence[str]) -> str:
    """One process as a line that a shell understands."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in own.items()), *command])


def exit_code(code: int) -> int:
    """The shell's convention for a process that a signal ended: 128 + signal."""
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
