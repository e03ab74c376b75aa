"""One HTTP request with a JSON answer that ends in time, and the patience to make several.

Standard library alone. Nothing is followed, nothing unpickled, nothing read without a limit.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards import host

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two attempts: doubled from the first to the longest, times 0.5 … 1 by chance."""


class Failure(Exception):
    """A request without a usable answer; `again`: another attempt may help, `wait` seconds from now."""

    def __init__(self, message: str, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.wait = again, wait


class Address(NamedTuple):
    """Where a server is, and the key that it wants (from an environment variable, never from the config)."""

    secure: bool
    host: str
    port: int | None
    path: str
    headers: Mapping[str, str]


def address(reward: str, url: str, key_env: str = "") -> Address:
    """The parts of a URL; a mistake in it is a UserError."""
    wanted = f'reward {reward}: got url "{url}", want http://HOST:PORT'
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(wanted) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise UserError(wanted)
    headers = {"Accept": "application/json", "Connection": "close"}
    if key_env:
        if not os.environ.get(key_env):
            raise UserError(f"reward {reward}: the environment variable {key_env} is empty, want the key")
        headers["Authorization"] = f"Bearer {os.environ[key_env]}"
    return Address(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/"), headers)


def exchange(to: Address, path: str, seconds: float, most: int, body: bytes | None = None) -> Any:
    """The JSON that the server answers to GET, or to POST where there is a body; Failure for all else.

    `seconds` bound the whole exchange: a socket's own time-out starts anew with every byte that drips in.
    """
    kind = http.client.HTTPSConnection if to.secure else http.client.HTTPConnection
    connection = kind(to.host, to.port, timeout=seconds)
    sockets: list[socket.socket] = []

    def talk() -> tuple[int, Any, bytes]:
        connection.connect()
        sockets.append(connection.sock)
        json_type = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            "GET" if body is None else "POST", to.path + path, body, {**to.headers, **json_type}
        )
        response = connection.getresponse()
        return response.status, response.headers, response.read(most + 1)

    try:
        status, headers, content = host.begin(talk)(seconds)
    except TimeoutError:
        raise Failure(f"no answer within {seconds:.3g} s", again=True) from None
    except (OSError, http.client.HTTPException) as error:
        raise Failure(host.reason(error), again=True) from None
    finally:
        for sock in sockets:  # wakes the thread that still reads from it
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    return parsed(status, headers, content, most)


def parsed(status: int, headers: Any, content: bytes, most: int) -> Any:
    """The JSON of a good answer; Failure, with whether to try again, for a bad one."""
    start = " ".join(content[:80].decode("utf-8", "replace").split())
    if status != 200:
        if 300 <= status < 400:
            raise Failure(f"status {status}: moved to {headers.get('Location', '?')!r:.80}: set url to that")
        busy = status >= 500 or status in (408, 429)
        raise Failure(f"status {status}: {start}", again=busy, wait=pause_of(headers.get("Retry-After")))
    if len(content) > most:
        raise Failure(f"an answer of more than {most:,} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise Failure(f"no JSON but {start!r}", again=True) from None


def pause_of(text: str | None) -> float:
    """Seconds of a Retry-After header: a number, or a date; 0 where there is none."""
    if not text:
        return 0.0
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


class Breaker:
    """Spares a server that is gone: after `limit` failed batches in a row nothing is asked for `cooldown`
    seconds, then one batch tries once; its answer closes the circuit, its failure opens it again."""

    def __init__(self, limit: int, cooldown: float) -> None:
        self._limit, self._cooldown = limit, cooldown
        self._lock = threading.Lock()
        self._failures, self._since, self._trying, self._last = 0, 0.0, False, ""

    def enter(self) -> bool:
        """Whether this batch is the one that tries; Failure while the circuit is open."""
        with self._lock:
            if self._failures < self._limit:
                return False
            if self._trying or time.monotonic() - self._since < self._cooldown:
                raise Failure(f"not asked, {self._failures} batches failed in a row: {self._last}")
            self._trying = True
            return True

    def leave(self, failure: str = "") -> None:
        """A batch is done: with an answer, or with this failure."""
        with self._lock:
            self._failures = self._failures + 1 if failure else 0
            self._since, self._trying, self._last = time.monotonic(), False, failure


def patiently(attempt: Callable[[float], T], limits: Host, breaker: Breaker) -> T:
    """The first result of `attempt(seconds)`: again after failures that may pass, longer pauses each time,
    until the attempts or the time of the batch are used up."""
    end = time.monotonic() + limits.deadline
    attempts = 1 if breaker.enter() else limits.retries + 1
    failure = Failure("no time left")
    done = 0
    try:
        for done in range(1, attempts + 1):
            try:
                result = attempt(min(limits.timeout, end - time.monotonic()))
            except Failure as found:
                failure = found
            else:
                breaker.leave()
                return result
            pause = max(failure.wait, pause_after(done))
            if not failure.again or done == attempts or time.monotonic() + pause >= end:
                break
            time.sleep(pause)
    except BaseException as error:
        breaker.leave(host.reason(error))
        raise
    # a server that says no is there: only silence and breakdowns open the circuit
    breaker.leave(str(failure) if failure.again else "")
    raise Failure(f"{failure}" + (f" ({done} attempts)" if done > 1 else ""), failure.again)


def pause_after(attempts: int) -> float:
    """Exponential back-off with jitter, so that waiting clients do not come back all at once."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempts - 1)) * random.uniform(0.5, 1.0)
