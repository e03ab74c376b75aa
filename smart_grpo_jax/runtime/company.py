"""What the processes of a run tell each other about themselves, and who is to blame when it stops.

A TCP line to process 0, beside the collectives: these are what hangs when a process is gone. Every process
sends a beat each second, process 0 answers with its own, and it alone judges; only when process 0 itself is
gone, everybody judges for himself. So all end with the same line. How it is judged: `judge`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from smart_grpo_jax.core.errors import LINE_LIMIT, PleaseRestart
from smart_grpo_jax.runtime import distributed

KEY = "sgrpo/watchdog"
CONNECT_SECONDS = 60.0
GO_ON = "the same command goes on from the last checkpoint"


class Beat(NamedTuple):
    """Where a process stands: `position` counts the places of the program that all processes pass in the same
    order; the phase it is in (or came from), whether the deadline holds there, for how long it has passed
    nothing, and by what factor `lag` and `deadline` are stretched while programs are compiled."""

    position: int = 0
    phase: str = "start"
    step: int = 0
    inside: bool = False
    timed: bool = False
    age: float = 0.0
    stretch: float = 1.0

    @property
    def where(self) -> str:
        """`in phase rollout of step 3`."""
        return f"{'in' if self.inside else 'after'} phase {self.phase} of step {self.step}"


class Seen(NamedTuple):
    """What is known of a process: its last beat, seconds since, whether its line broke, how it left."""

    name: str
    beat: Beat
    silent: float = 0.0
    gone: bool = False
    left: tuple[int, str] | None = None


class Limits(NamedTuple):
    """Seconds: without a sign of life, behind the others, in one place together (0: for ever)."""

    silence: float
    lag: float
    deadline: float


class Verdict(NamedTuple):
    """The line that everybody says, and the exit code that everybody leaves with."""

    line: str
    code: int = PleaseRestart.exit_code


def judge(seen: Mapping[int, Seen], limits: Limits) -> Verdict | None:
    """Who is to blame, if anybody. The first rule that finds someone decides:

    1. who left with an error: all leave with its code, since starting again would not help;
    2. whose line broke without a word: it died (a kill, a crash, a lost host closes or resets the line);
    3. who was silent for longer than `silence`: stopped, or out of reach;
    4. who is behind: of all positions the lowest, below the highest, for longer than `lag`. Those who wait
       for it in a collective have passed more places than it has: it is asleep, and not they;
    5. where all are at one place for longer than `deadline`, the place is named: none is behind.
    """
    there = {rank: one for rank, one in seen.items() if one.left is None}
    for one in seen.values():
        if one.left is not None and one.left[0]:
            return Verdict(f"{one.name} ended with exit code {one.left[0]}: {one.left[1]}", one.left[0])
    for one in there.values():
        if one.gone:
            return Verdict(f"{one.name} died {one.beat.where}; ending ({GO_ON})")
    for one in there.values():
        if 0 < limits.silence < one.silent:
            return Verdict(
                f"{one.name} has been silent for {one.silent:.0f} s, last {one.beat.where}; ending ({GO_ON})"
            )
    return _late(there, limits)


def _late(there: Mapping[int, Seen], limits: Limits) -> Verdict | None:
    if len(there) < 2:
        return None
    last = min(there.values(), key=lambda one: one.beat.position)
    beat, front = last.beat, max(one.beat.position for one in there.values())
    if beat.position < front and 0 < limits.lag * beat.stretch < beat.age:
        return Verdict(
            f"{last.name} has kept the others waiting {beat.where} for {beat.age:.0f} s; ending ({GO_ON})"
        )
    youngest = min(one.beat.age for one in there.values())
    if beat.position == front and beat.timed and 0 < limits.deadline * beat.stretch < youngest:
        return Verdict(f"all processes have been {beat.where} for {youngest:.0f} s; ending ({GO_ON})")
    return None


class Peer:
    """One end of a line, and what came over it."""

    def __init__(self, line: socket.socket, name: str = "") -> None:
        self.line, self.name, self.rank = line, name, -1
        self.beat, self.heard = Beat(), time.monotonic()
        self.gone = False
        self.left: tuple[int, str] | None = None
        self._rest, self._writing = b"", threading.Lock()
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A stopped process reads nothing: its full line must not stop the one who writes.
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 1, 0))

    def send(self, message: Mapping[str, Any]) -> None:
        """One message, or nothing where the line is broken."""
        with contextlib.suppress(OSError), self._writing:
            self.line.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived; marks the line as broken."""
        try:
            piece = self.line.recv(2**16)
        except OSError:
            piece = b""
        if not piece:
            self.gone = True
            return []
        *lines, self._rest = (self._rest + piece).split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [message for message in found if isinstance(message, dict)]

    def seen(self, now: float) -> Seen:
        """As `judge` sees it."""
        silent = now - self.heard
        beat = self.beat._replace(age=self.beat.age + silent)
        return Seen(self.name, beat, silent, self.gone, self.left)


class Company:
    """The lines of this process: to all others at process 0, to process 0 at the others.

    `wake` is called when something has happened that should be judged at once; `verdict` is what process 0
    has said.
    """

    def __init__(self, rank: int, count: int, wake: Callable[[], None]) -> None:
        self.rank, self.count, self._wake = rank, count, wake
        self.name = f"process {rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self.verdict: Verdict | None = None
        self.peers: dict[int, Peer] = {}
        self._selector = selectors.DefaultSelector()
        if rank == 0:
            self._listen(count)
        else:
            self._call()
        threading.Thread(target=self._read, name="company", daemon=True).start()

    def _listen(self, count: int) -> None:
        host = distributed.coordinator_host()
        here = host if host in ("localhost", "127.0.0.1", "::1") else ""
        self._token = secrets.token_hex(16)
        listener = socket.create_server((here, 0), backlog=count)
        self._selector.register(listener, selectors.EVENT_READ, None)
        distributed.publish(KEY, json.dumps([listener.getsockname()[1], self._token]))

    def _call(self) -> None:
        port, token = json.loads(distributed.published(KEY))
        until = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                line = socket.create_connection((distributed.coordinator_host(), port), timeout=5.0)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        line.settimeout(None)
        peer = Peer(line, "process 0")
        peer.rank = 0
        peer.send({"token": token, "rank": self.rank, "name": self.name})
        self.peers[0] = peer
        self._selector.register(line, selectors.EVENT_READ, peer)

    def _read(self) -> None:
        while True:
            for key, _ in self._selector.select():
                peer: Peer | None = key.data
                if peer is None:
                    line, _ = key.fileobj.accept()  # pyright: ignore[reportAttributeAccessIssue]
                    self._selector.register(line, selectors.EVENT_READ, Peer(line))
                    continue
                for message in peer.receive():
                    self._take(peer, message)
                if peer.gone:
                    self._selector.unregister(peer.line)
                    if peer.rank >= 0:
                        self._wake()

    def _take(self, peer: Peer, message: dict[str, Any]) -> None:
        if peer.rank < 0:
            if message.get("token") != self._token:
                peer.gone = True
                return
            peer.rank, peer.name = int(message["rank"]), str(message["name"])
            peer.send({"name": self.name})
            self.peers[peer.rank] = peer
        peer.heard = time.monotonic()
        peer.name = str(message.get("name", peer.name))
        if "beat" in message:
            peer.beat = Beat(*message["beat"])
        if "left" in message:
            peer.left = int(message["left"][0]), str(message["left"][1])
            self._wake()
        if "verdict" in message:
            self.verdict = Verdict(str(message["verdict"][0]), int(message["verdict"][1]))
            self._wake()

    def tell(self, **message: Any) -> None:
        """To all lines: a beat, a farewell or a verdict."""
        for peer in list(self.peers.values()):
            if not peer.gone:
                peer.send(message)

    def forgive(self) -> None:
        """After a time in which this process itself did not run, the silence of others means nothing."""
        for peer in self.peers.values():
            peer.heard = time.monotonic()

    def judged(self, own: Beat, limits: Limits) -> Verdict | None:
        """What process 0 has said; at process 0, and where it is gone, the own judgement."""
        if self.verdict is not None:
            return self.verdict
        now = time.monotonic()
        seen = {rank: peer.seen(now) for rank, peer in sorted(self.peers.items())}
        if self.rank:
            limits = limits._replace(lag=0.0, deadline=0.0)
        return judge({self.rank: Seen(self.name, own), **seen}, limits)


def short(line: str) -> str:
    """At most a line of the screen, as all errors."""
    return line if len(line) <= LINE_LIMIT else line[: LINE_LIMIT - 1] + "…"
