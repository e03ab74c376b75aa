"""SIGTERM and SIGINT as a flag that the loop looks at between its phases."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType, TracebackType

from smart_grpo_jax.core.errors import PleaseRestart

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """The first signal raises the flag, the second ends the process at once with code 75.

    Python runs a signal handler only between two instructions of the main thread, and a long XLA
    program is one instruction. The bytes that the interpreter writes to the wake-up socket arrive
    at once, so the second signal is obeyed by a thread that reads them. Outside the main thread, where
    Python allows no handlers, the flag simply stays down.
    """

    def __init__(self) -> None:
        self._requested: str | None = None
        self._old: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> str | None:
        """The name of the signal that asked for a stop, or None."""
        return self._requested

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._old.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
            self._old = {}
            self._writer.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = self._requested or signal.Signals(number).name

    def _listen(self) -> None:
        count = 0
        while data := self._reader.recv(16):
            for number in data:
                if number not in SIGNALS:
                    continue
                count += 1
                name = signal.Signals(number).name
                if count > 1:
                    _tell(f"{name} again: leaving at once; the last checkpoint stands")
                    os._exit(PleaseRestart.exit_code)
                self._requested = self._requested or name
                _tell(f"{name}: saving at the next safe point; once more to leave at once")
        self._reader.close()


def _tell(text: str) -> None:
    """Straight to the descriptor: the main thread may hold the lock of the buffered stream."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        return
