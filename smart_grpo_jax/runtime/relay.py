"""A way to the coordinator that stays open when the coordinator is gone.

jax's client of the coordination service aborts its process in the moment in which the connection breaks,
with a stack of C++ in the place of a reason. Where process 0 died, that would be the last word of every
other one. So each of them reaches the service through a relay of its own: when the far end breaks, the
near end hears nothing, and the watchdog (watchdog.py) has the time to say who died and in which phase.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

PIECE = 2**16


class Relay:
    """Listens on this machine alone and carries every connection to `address` (host:port)."""

    def __init__(self, address: str, patience: float) -> None:
        host, _, port = address.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self._until = time.monotonic() + patience
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._carry, args=(near,), name="relay", daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        try:
            far = self._reach()
        except OSError:
            near.close()  # the service is not there yet: jax tries again
            return
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_outward, args=(near, far), name="relay", daemon=True).start()
        with contextlib.suppress(OSError):
            while piece := far.recv(PIECE):
                near.sendall(piece)
        # `near` stays open: nobody is told.

    def _reach(self) -> socket.socket:
        while True:
            try:
                far = socket.create_connection(self._target, timeout=5.0)
                far.settimeout(None)
                return far
            except OSError:
                if time.monotonic() > self._until:
                    raise
                time.sleep(0.1)


def _outward(near: socket.socket, far: socket.socket) -> None:
    """What jax sends; when jax itself hangs up, so does the far end."""
    with contextlib.suppress(OSError):
        while piece := near.recv(PIECE):
            far.sendall(piece)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)
