"""A reward server in the standard library: subclass, override `score`, run.

    class Sharp(RewardServer):
        name = "sharp"

        def score(self, images, prompts, metadata):
            return [float(image.std()) for image in images]

    Sharp().run(port=8001)

`python -m smart_grpo_jax.rewards.server --reward my_rewards:sharp --port 8001` serves any reward by its name.
The protocol is that of remote.py; docs/your_rewards.md has it in full.
"""

from __future__ import annotations

import abc
import base64
import io
import json
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import Prompt
from smart_grpo_jax.rewards import host, user
from smart_grpo_jax.rewards.base import REWARDS, known, load_reward

Images = UInt8[np.ndarray, "b H W 3"]
ScoreFunction = Callable[[Images, list[str], list[dict[str, Any]]], Sequence[Any]]
"""score(images, prompts, metadata) -> one number, None, text or {"score", "parts", "text"} per image."""


class BadRequest(Exception):
    """What the client gets told with status 400."""


class Request(NamedTuple):
    """A checked request."""

    key: str
    reward: str
    ids: list[str]
    images: Images
    prompts: list[str]
    metadata: list[dict[str, Any]]


class RewardServer(abc.ABC):
    """A server of one reward. The limits are class attributes, for a subclass to change."""

    name = "reward"
    most_bytes = 256 * 2**20
    most_items = 256
    most_pixels = 4096 * 4096
    remembered = 64
    """Replies kept for a client that asks again under the same request id."""

    @abc.abstractmethod
    def score(self, images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Sequence[Any]:
        """One entry per image: a number, None (missing), a text, or {"score", "parts", "text", "error"}.

        Called by one thread at a time.
        """

    def functions(self) -> Mapping[str, ScoreFunction]:
        """What is served under which name."""
        return {self.name: self.score}

    def start(self, port: int = 0, host: str = "127.0.0.1") -> Running:
        """Listen (port 0: any free one) and answer in the background."""
        return Running(self, host, port)

    def run(self, port: int = 8001, host: str = "127.0.0.1") -> None:
        """Listen and answer until interrupted."""
        with self.start(port, host) as running:
            print(f"serving {', '.join(self.functions())} on {running.url}", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                pass


class Running:
    """A server that listens; a context manager that ends it."""

    def __init__(self, rewards: RewardServer, address: str, port: int) -> None:
        handler = type("Handler", (_Handler,), {"desk": Desk(rewards)})
        try:
            self._server = ThreadingHTTPServer((address, port), handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port: cannot listen on {address}:{port}: {error}") from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://{address}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Desk:
    """Between HTTP and the reward: checks, one call at a time, the same reply to the same request id."""

    def __init__(self, rewards: RewardServer) -> None:
        self.rewards, self.functions = rewards, rewards.functions()
        self._lock = threading.Lock()
        self._replies: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def health(self) -> dict[str, Any]:
        """What GET /health answers."""
        return {"ok": True, "name": self.rewards.name, "rewards": list(self.functions)}

    def reply(self, body: bytes) -> dict[str, Any]:
        """What POST /score answers."""
        request = read(body, self.rewards, self.functions)
        with self._lock:  # a repeated request waits for the first one here, then finds its reply
            if request.key not in self._replies:
                rows = judged(self.functions[request.reward], request)
                self._replies[request.key] = {"id": request.key, "scores": rows}
                if len(self._replies) > self.rewards.remembered:
                    self._replies.popitem(last=False)
            return self._replies[request.key]


def read(body: bytes, limits: RewardServer, functions: Mapping[str, ScoreFunction]) -> Request:
    """The request, checked; BadRequest says in a line what is wrong with it."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is no JSON") from None
    items = data.get("items") if isinstance(data, dict) else None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise BadRequest('want {"id", "reward", "items": [{"id", "image", "prompt", "metadata"}]}')
    if len(items) > limits.most_items:
        raise BadRequest(f"got {len(items)} items, want at most {limits.most_items}")
    reward = data.get("reward") or next(iter(functions))
    if reward not in functions:
        raise BadRequest(f'got reward "{reward!s:.40}" ({nearest(str(reward), functions)})')
    ids = [str(item.get("id")) for item in items]
    if len(set(ids)) < len(ids) or not all("id" in item for item in items):
        raise BadRequest("want an id of its own for each item")
    images = [picture(item.get("image"), limits.most_pixels) for item in items]
    if len({image.shape for image in images}) > 1:
        raise BadRequest("want images of one size in a request")
    metadata = [item.get("metadata") or {} for item in items]
    if not all(isinstance(entry, dict) for entry in metadata):
        raise BadRequest("want an object as metadata")
    prompts = [str(item.get("prompt", "")) for item in items]
    key = str(data.get("id") or object())
    return Request(key, reward, ids, np.stack(images), prompts, metadata)


def picture(text: Any, most_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a base64 PNG; nothing but PNG is opened."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        if image.width * image.height > most_pixels:
            raise BadRequest(f"got {image.width} x {image.height} pixels, want at most {most_pixels:,}")
        return np.asarray(image.convert("RGB"))
    except BadRequest:
        raise
    except Exception:  # a damaged file fails in many ways, all of them the client's
        raise BadRequest("want each image as a PNG file in base64") from None


def judged(function: ScoreFunction, request: Request) -> list[dict[str, Any]]:
    """A row per item. Where the call fails the items are tried one by one: one bad image costs one score."""
    args = (request.images, request.prompts, request.metadata)
    try:
        values = list(function(*args))
        if len(values) != len(request.ids):
            raise ValueError(f"{len(values)} scores for {len(request.ids)} images")
    except Exception as error:
        if len(request.ids) == 1:
            return [{"id": request.ids[0], "score": None, "error": host.reason(error)[:200]}]
        single = [
            Request("", "", [name], image[None], [prompt], [entry])
            for name, image, prompt, entry in zip(request.ids, *args, strict=True)
        ]
        return [row for one in single for row in judged(function, one)]
    return [{"id": name} | row(value) for name, value in zip(request.ids, values, strict=True)]


def row(value: Any) -> dict[str, Any]:
    """What a score function said of one image, as JSON has it."""
    if isinstance(value, Mapping):
        parts = {str(k): host.number(v)[0] for k, v in (value.get("parts") or {}).items()}
        found = row(value.get("score")) | {"parts": {k: v for k, v in parts.items() if math.isfinite(v)}}
        return found | {k: str(value[k]) for k in ("text", "error") if value.get(k) is not None}
    if isinstance(value, str):
        return {"score": None, "text": value}
    score, error = host.number(value)
    missing = {"error": error} if value is not None else {}
    return {"score": None} | missing if error else {"score": score}


class _Handler(BaseHTTPRequestHandler):
    """HTTP: two paths, a bounded body, one line for whatever is wrong."""

    desk: Desk
    timeout = 60
    server_version, sys_version = "smart_grpo_jax", ""

    def do_GET(self) -> None:
        """GET /health."""
        if self.path.rstrip("/") != "/health":
            return self._send(404, {"error": f"no {self.path:.40}, want /health or /score"})
        return self._send(200, self.desk.health())

    def do_POST(self) -> None:
        """POST /score."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            return self._send(411, {"error": "want a Content-Length"})
        if int(length) > self.desk.rewards.most_bytes:
            self.close_connection = True
            return self._send(413, {"error": f"want at most {self.desk.rewards.most_bytes:,} bytes"})
        body = self.rfile.read(int(length))
        if self.path.rstrip("/") != "/score":
            return self._send(404, {"error": f"no {self.path:.40}, want /health or /score"})
        try:
            return self._send(200, self.desk.reply(body))
        except BadRequest as error:
            return self._send(400, {"error": str(error)})
        except Exception as error:
            return self._send(500, {"error": host.reason(error)[:200]})

    def _send(self, status: int, answer: Mapping[str, Any]) -> None:
        content = json.dumps(answer, allow_nan=False).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client gave up waiting
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a training run asks thousands of times."""


class NamedRewards(RewardServer):
    """Rewards of the package, or a user's functions, by their names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.name, self._functions = "+".join(names), {name: named(name) for name in names}

    def functions(self) -> Mapping[str, ScoreFunction]:
        """Each under its own name."""
        return self._functions

    def score(self, images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Sequence[Any]:
        """The first one."""
        return next(iter(self._functions.values()))(images, prompts, metadata)


def named(name: str) -> ScoreFunction:
    """The reward of this name as a function; a user's plain Python is called as it is, so that it may
    answer with parts and texts."""
    known(name, "--reward")
    if name not in REWARDS and isinstance(found := user.find(name), user.HostFunction):
        return found.function
    score = load_reward(name)

    def call(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Sequence[Any]:
        texts = [Prompt(text, entry) for text, entry in zip(prompts, metadata, strict=True)]
        values = score(images.astype(np.float32) / 255, texts)  # type: ignore[arg-type]
        return [float(v) if math.isfinite(v) else None for v in values]

    return call


def main(argv: Sequence[str]) -> int:
    """The command line; a mistake is one line and exit code 2."""
    usage = (
        "python -m smart_grpo_jax.rewards.server --reward NAME [--reward NAME …] [--port N] [--host ADDRESS]"
    )
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not words or not set(words[::2]) <= {"--reward", "--port", "--host"}:
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    pairs = list(zip(words[::2], words[1::2], strict=True))
    try:
        names = [value for flag, value in pairs if flag == "--reward"]
        flags = dict(pairs)
        port = flags.get("--port", "8001")
        if not names or not port.isdigit():
            raise UserError(f"usage: {usage}")
        NamedRewards(names).run(int(port), flags.get("--host", "127.0.0.1"))
    except UserError as error:
        print(error.line, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
