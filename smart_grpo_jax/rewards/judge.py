"""A vision-language model as a judge, behind the chat-completions protocol of OpenAI and its many servers.

One request per image: a question with the prompt in it, and the picture. The number is cut out of the
answer by a pattern; an answer without one, or with one off the scale, is a missing score and never 0.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards import host, remote, wire
from smart_grpo_jax.rewards.base import Reward, no_prompt, nothing, without_weights

TEMPLATE = (
    'Judge how well this image shows "{prompt}": objects, numbers, colours and positions, then quality. '
    "Give one number from 0 (nothing of it) to {scale} (all of it, well made) in the last line, as Score: N"
)
PATTERN = r"(?i:score)[\s:=*_]*(-?\d+(?:\.\d+)?)"
MOST_BYTES = 1_048_576


def grade(text: str, pattern: re.Pattern[str], scale: float) -> host.Answer:
    """The last number that the pattern finds, from 0 … scale to 0 … 1."""
    found = pattern.findall(text)
    if not found:
        return host.Answer(None, f"no score in {text[-60:]!r}")
    try:
        value = float(found[-1])
    except ValueError:
        return host.Answer(None, f"no number but {found[-1]!r:.40}")
    if not 0 <= value <= scale:
        return host.Answer(None, f"score {value:g} is not in 0 … {scale:g}")
    return host.Answer(value / scale)


def content(reply: Any) -> str:
    """The text of a chat completion."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise wire.Failure(f"{json.dumps(reply)[:60]} is no chat completion")
    return text


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, which must have the number as its only group."""
    try:
        made = re.compile(pattern)
    except re.error as error:
        raise UserError(f'reward judge: got pattern "{pattern}": {error}') from None
    if made.groups != 1:
        raise UserError(f'reward judge: got pattern "{pattern}", want one group: the number')
    return made


def build(
    path: str | None = None,
    dtype: str = "float32",
    limits: Host | None = None,
    url: str = "",
    model: str = "",
    template: str = TEMPLATE,
    pattern: str = PATTERN,
    scale: float = 5.0,
    max_tokens: int = 256,
    key_env: str = "",
    breaker: int = 3,
    cooldown: float = 10.0,
) -> Reward:
    """The grade of `model` at `url` (…/v1); the key is the content of the environment variable `key_env`."""
    without_weights("judge", path)
    if not url or not model:
        raise UserError('reward judge: want url, such as "http://127.0.0.1:8000/v1", and model')
    if scale <= 0:
        raise UserError(f"reward judge: got scale {scale:g}, want > 0")
    limits = dataclasses.replace(limits or Host(), batch=1)
    found, to = compiled(pattern), wire.address("judge", url, key_env)
    circuit = wire.Breaker(int(breaker), cooldown)
    greet(url, to, circuit)

    def ask(batch: host.Batch) -> list[host.Answer]:
        prompt = batch.prompts[0]
        question = template.replace("{scale}", f"{scale:g}").replace("{prompt}", str(prompt))
        picture = f"data:image/png;base64,{remote.png(batch.images[0])}"
        message = {
            "role": "user",
            "content": [
                {"type": "text", "text": question},
                {"type": "image_url", "image_url": {"url": picture}},
            ],
        }
        request = {"model": model, "messages": [message], "temperature": 0, "max_tokens": int(max_tokens)}
        body = json.dumps(request).encode()

        def attempt(seconds: float) -> Any:
            return wire.exchange(to, "/chat/completions", seconds, MOST_BYTES, body)

        return [grade(content(wire.patiently(attempt, limits, circuit)), found, scale)]

    scorer = host.scorer(ask, limits)
    return Reward("judge", {}, no_prompt, nothing().score, uses_prompt=True, host=scorer)


def greet(url: str, to: wire.Address, circuit: wire.Breaker) -> None:
    """UserError where nothing answers, or the key is refused; a server without /models is there, too."""
    once = Host(timeout=remote.GREETING_SECONDS, retries=2, deadline=2 * remote.GREETING_SECONDS)
    try:
        wire.patiently(lambda seconds: wire.exchange(to, "/models", seconds, MOST_BYTES), once, circuit)
    except wire.Failure as failure:
        if failure.again or re.match("status (401|403)", str(failure)):
            raise UserError(f"reward judge: no model answers at {url}/models: {failure}") from None
