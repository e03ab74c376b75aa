"""What a run says: the start-up box, one line per epoch, and a sign of life in long silences."""

from __future__ import annotations

import math
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

WIDTH = 100


_speaks = threading.Event()
_speaks.set()


def speak(aloud: bool) -> None:
    """Of several processes one speaks; the others are silent from here on."""
    (_speaks.set if aloud else _speaks.clear)()


def say(text: str) -> None:
    """One line on stdout, at once; a closed pipe is no reason to stop a run."""
    if not _speaks.is_set():
        return
    try:
        print(f"{text}\n", end="", file=sys.stdout, flush=True)  # in one piece: threads speak, too
    except (OSError, ValueError):
        return


def duration(seconds: float) -> str:
    """`7 s`, `3m 04s`, `2h 05m`, `3d 04h`."""
    whole = max(0, round(seconds))
    for unit, small, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part:02d}{small}"
    return f"{whole} s"


def number(value: Any) -> str:
    """A value as a person reads it: four digits, no exponent where none is needed; text stays text."""
    if isinstance(value, str) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1_000_000 else f"{value:.3g}"
    return f"{float(value):.4g}" if math.isfinite(float(value)) else str(float(value))


def box(title: str, rows: list[tuple[str, str]]) -> str:
    """The rows (name, value) in a frame of at most 100 columns; long values are wrapped."""
    left = min(30, max((len(name) for name, _ in rows), default=0))
    room = WIDTH - left - 6
    body: list[str] = []
    for name, value in rows:
        parts = textwrap.wrap(str(value), room, break_long_words=True) or [""]
        names = textwrap.wrap(name, left, break_long_words=True) or [""]
        for i in range(max(len(parts), len(names))):
            head = names[i] if i < len(names) else ""
            body.append(f"{head:<{left}}  {parts[i] if i < len(parts) else ''}".rstrip())
    title = title[: WIDTH - 6]
    inner = max([len(title) + 2, *(len(line) for line in body)])
    top = f"╭─ {title} {'─' * (inner - len(title) - 1)}╮"
    return "\n".join([top, *(f"│ {line:<{inner}} │" for line in body), f"╰{'─' * (inner + 2)}╯"])


def epoch_line(epoch: int, total: int, fields: Mapping[str, Any], eta: float | None) -> str:
    """`epoch 120/2000 6.0% | reward 0.412 | … | ETA 57m 00s`; the fields keep their order."""
    share = 100.0 * epoch / total if total else 100.0
    parts = [f"epoch {epoch}/{total} {share:.1f}%", *(f"{k} {number(v)}" for k, v in fields.items())]
    if eta is not None:
        parts.append(f"ETA {duration(eta)}")
    return " | ".join(parts)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A plain text table; columns that hold only numbers are set to the right."""
    cells = [[number(value) for value in row] for row in rows]
    columns = list(zip(*([list(header), *cells]), strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(not isinstance(row[i], str) for row in rows) and bool(rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, right, strict=True)
        return "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in pairs).rstrip()

    return "\n".join([line(list(header)), "  ".join("─" * w for w in widths), *map(line, cells)])


class Eta:
    """How long the rest takes: the mean of the last epochs, without the slowest and the fastest.

    The first epochs of a process compile and are left out. `state()` goes into a checkpoint's meta, and
    `Eta(total, carried=…)` goes on from it, so that the time spent survives restarts.
    """

    def __init__(
        self, total: int, *, carried: Mapping[str, Any] | None = None, skip: int = 1, window: int = 20
    ) -> None:
        self._total, self._skip = total, skip
        carried = carried or {}
        self.seconds = float(carried.get("seconds", 0.0))
        self._recent = deque((float(s) for s in carried.get("recent", ())), maxlen=window)

    def add(self, seconds: float) -> None:
        """One more epoch took so long."""
        self.seconds += seconds
        if self._skip > 0:
            self._skip -= 1
        else:
            self._recent.append(seconds)

    def remaining(self, epoch: int) -> float | None:
        """Seconds until the last epoch when `epoch` is done; None before the first that counts."""
        times = sorted(self._recent)
        if not times:
            return None
        kept = times[1:-1] if len(times) >= 5 else times
        return max(0, self._total - epoch) * sum(kept) / len(kept)

    def state(self) -> dict[str, Any]:
        """What a restart needs: seconds spent in all, and the last epochs."""
        return {"seconds": self.seconds, "recent": list(self._recent)}


class Heartbeat:
    """While the body runs, says every so often for how long: silence during a compilation reads as a hang.

    A body that is quicker than `every` leaves no trace. `on_beat(seconds)` is called along with each line.
    """

    def __init__(
        self,
        what: str,
        every: float = 10.0,
        *,
        say: Callable[[str], None] = say,
        on_beat: Callable[[float], None] | None = None,
    ) -> None:
        self._what, self._every, self._say, self._on_beat = what, every, say, on_beat
        self._done = threading.Event()
        self._spoke = False

    def _beat(self) -> None:
        while not self._done.wait(self._every):
            self._spoke = True
            seconds = time.monotonic() - self._start
            self._say(f"{self._what}, {duration(seconds)} so far")
            if self._on_beat is not None:
                self._on_beat(seconds)

    def __enter__(self) -> Heartbeat:
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._spoke and kind is None:
            self._say(f"{self._what}: done in {duration(time.monotonic() - self._start)}")


class Transfer:
    """How far a long read is: numbers read so far, as GB, GB/s and the time that is left.

    Called with the count of each piece; speaks at most every few seconds, and not at all when quick.
    """

    def __init__(
        self, what: str, count: int, nbytes: int, every: float = 5.0, *, say: Callable[[str], None] = say
    ) -> None:
        self._what, self._count, self._nbytes, self._every, self._say = what, count, nbytes, every, say
        self._done = 0
        self._start = self._spoke = time.monotonic()

    def __call__(self, count: int) -> None:
        """`count` more numbers have arrived."""
        self._done += count
        now = time.monotonic()
        if now - self._spoke < self._every:
            return
        self._spoke = now
        share = self._done / max(1, self._count)
        read, seconds = share * self._nbytes / 1e9, now - self._start
        left = seconds / max(share, 1e-9) * (1 - share)
        self._say(
            f"{self._what}: {read:.1f} of {self._nbytes / 1e9:.1f} GB, {read / seconds:.2f} GB/s, "
            f"{duration(left)} left"
        )

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._start
        if self._spoke > self._start and kind is None:
            size = self._nbytes / 1e9
            self._say(f"{self._what}: {size:.1f} GB in {duration(seconds)} ({size / seconds:.2f} GB/s)")
