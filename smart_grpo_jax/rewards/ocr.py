"""Text in pictures: a server reads, we compare with what the prompt asks for, as Flow-GRPO does.

score = 1 - min(edits, n) / n        n letters wanted, lower case, without spaces; 1 where they occur
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, metadata_of
from smart_grpo_jax.rewards import host
from smart_grpo_jax.rewards.base import Reward, nothing
from smart_grpo_jax.rewards.remote import connected

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def similarity(read: str, wanted: str) -> float:
    """How much of the wanted text was read, in [0, 1]."""
    read, wanted = read.replace(" ", "").lower(), wanted.replace(" ", "").lower()
    if wanted in read:
        return 1.0
    return 1.0 - min(edits(read, wanted), len(wanted)) / len(wanted)


def wanted_text(prompt: str) -> str:
    """What the picture must say: `text` of the metadata, else the first words in double quotes."""
    found = QUOTED.search(prompt)
    given = metadata_of(prompt).get("text") or (found and (found[1] or found[2])) or ""
    return given if str(given).replace(" ", "") else ""


def quoting(prompts: Sequence[str]) -> PyTree:
    """Nothing for the graph; UserError for a prompt without a text to draw."""
    for prompt in prompts:
        if not wanted_text(prompt):
            raise UserError(
                f'reward ocr: prompt "{prompt:.40}" asks for no text, want it in double quotes, or "text" in '
                "its metadata"
            )
    return {}


def build(
    path: str | None = None,
    dtype: str = "float32",
    limits: Host | None = None,
    url: str = "",
    reward: str = "",
    key_env: str = "",
    breaker: int = 3,
    cooldown: float = 10.0,
) -> Reward:
    """The server's `text` against the text that the prompt asks for."""
    limits = limits or Host()
    client = connected("ocr", path, limits, url, reward, key_env, breaker, cooldown)

    def ask(batch: host.Batch) -> list[host.Answer]:
        return [_compared(a, prompt) for a, prompt in zip(client.ask(batch), batch.prompts, strict=True)]

    scorer = host.scorer(ask, limits)
    return Reward("ocr", {}, quoting, nothing().score, uses_prompt=True, host=scorer)


def _compared(answer: host.Answer, prompt: str) -> host.Answer:
    if answer.error or answer.text is None:
        return answer._replace(score=None, error=answer.error or "the answer has no text")
    return answer._replace(score=similarity(answer.text, str(wanted_text(prompt))))
