"""A reward behind HTTP: JSON with PNG pictures there, JSON with scores back (docs/your_rewards.md).

GET  /health -> {"ok": true, "name": "...", "rewards": ["..."]}
POST /score     {"id": "...", "reward": "...", "items": [{"id", "image", "prompt", "metadata"}]}
             -> {"scores": [{"id", "score": number or null, "error"?, "parts"?, "text"?}]}
"""

from __future__ import annotations

import base64
import io
import json
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.rewards import host, wire
from smart_grpo_jax.rewards.base import Reward, no_prompt, nothing, without_weights

MOST_BYTES, MOST_BYTES_PER_ITEM = 65_536, 16_384
"""The longest answer that is read: so much, and so much more per image."""

GREETING_SECONDS, GREETINGS = 5.0, 3
"""How long a server may take to say at the start that it is there, and how often it is asked."""


def png(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """The picture as a PNG file in base64: exact, where JPEG would move the score."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class Client:
    """One reward of one server."""

    def __init__(
        self, row: str, url: str, reward: str, key_env: str, limits: Host, breaker: wire.Breaker
    ) -> None:
        if not url:
            raise UserError(f'reward {row}: has no url, want one such as "http://127.0.0.1:8001"')
        self.row, self.url, self.limits, self.breaker = row, url, limits, breaker
        self.to = wire.address(row, url, key_env)
        self.reward = self.greet(reward)

    def greet(self, reward: str) -> str:
        """The name of the reward to ask for, once the server has said that it serves it."""
        once = Host(timeout=GREETING_SECONDS, retries=GREETINGS - 1, deadline=2 * GREETING_SECONDS)
        try:
            health = wire.patiently(
                lambda seconds: wire.exchange(self.to, "/health", seconds, MOST_BYTES), once, self.breaker
            )
        except wire.Failure as failure:
            raise UserError(f"reward {self.row}: no server answers at {self.url}/health: {failure}") from None
        if not isinstance(health, dict) or health.get("ok") is not True:
            raise UserError(f"reward {self.row}: {self.url}/health says {json.dumps(health)[:60]}, want ok")
        served = [str(name) for name in health.get("rewards") or []]
        if not reward and len(served) > 1:
            raise UserError(f"reward {self.row}: {self.url} serves {', '.join(served)}; set reward to one")
        if reward and served and reward not in served:
            raise UserError(f'reward {self.row}: {self.url} serves no "{reward}" ({nearest(reward, served)})')
        return reward or "".join(served)

    def ask(self, batch: host.Batch) -> list[host.Answer]:
        """The server's answers to a batch; the request keeps its id through all attempts."""
        items = [
            {"id": name, "image": png(image), "prompt": str(prompt), "metadata": metadata}
            for name, image, prompt, metadata in zip(
                batch.ids, batch.images, batch.prompts, batch.metadata, strict=True
            )
        ]
        request = {"id": uuid.uuid4().hex, "reward": self.reward, "items": items}
        body = json.dumps(request, default=str).encode()
        most = MOST_BYTES + MOST_BYTES_PER_ITEM * len(items)

        def attempt(seconds: float) -> Any:
            return wire.exchange(self.to, "/score", seconds, most, body)

        return answers(wire.patiently(attempt, self.limits, self.breaker), batch.ids)


def answers(reply: Any, ids: Sequence[str]) -> list[host.Answer]:
    """The answers in the order of the ids. A reply that does not hold each id once is refused as a whole:
    who mixes up one image may have mixed up all."""
    rows = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise wire.Failure(f'{json.dumps(reply)[:60]} has no list "scores" of objects')
    if len(rows) != len(ids):
        raise wire.Failure(f"got {len(rows)} scores for {len(ids)} images")
    found = {str(row.get("id")): row for row in rows}
    if set(found) != set(ids):
        stray = next((name for name in found if name not in ids), None)
        raise wire.Failure(f"got a score for id {stray!r:.40}" if stray else "got two scores for one id")
    return [_answer(found[name]) for name in ids]


def _answer(row: dict[str, Any]) -> host.Answer:
    parts, text, error = row.get("parts"), row.get("text"), row.get("error")
    return host.Answer(
        row.get("score"),
        f"the server says: {error!s:.100}" if error else "",
        parts if isinstance(parts, dict) else {},
        text if isinstance(text, str) else None,
    )


def connected(
    row: str,
    path: str | None,
    limits: Host,
    url: str,
    reward: str,
    key_env: str,
    breaker: float,
    cooldown: float,
) -> Client:
    """The client of a row of the table, greeted; UserError where a path is given or no server answers."""
    without_weights(row, path)
    return Client(row, url, reward, key_env, limits, wire.Breaker(int(breaker), cooldown))


def names(parts: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the parts to log: `a,b` on the command line, a list in a file."""
    given = parts.split(",") if isinstance(parts, str) else parts
    return tuple(name.strip() for name in given if name.strip())


def build(
    path: str | None = None,
    dtype: str = "float32",
    limits: Host | None = None,
    url: str = "",
    reward: str = "",
    parts: str | Sequence[str] = "",
    key_env: str = "",
    breaker: int = 3,
    cooldown: float = 10.0,
) -> Reward:
    """What the server at `url` says; `parts` names the further numbers of its answers that are logged."""
    limits = limits or Host()
    client = connected("remote", path, limits, url, reward, key_env, breaker, cooldown)
    scorer = host.scorer(client.ask, limits, names(parts))
    return Reward("remote", {}, no_prompt, nothing().score, uses_prompt=True, host=scorer)
