"""GenEval's detector behind the protocol of remote.py: does the picture hold the objects that were asked for?

The server finds objects and grades them against the prompt's metadata (`include`, and `exclude`, as in
GenEval's files). It answers a graded score in [0, 1], and `strict`, 0 or 1, among its parts.
"""

from __future__ import annotations

from collections.abc import Sequence

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, metadata_of
from smart_grpo_jax.rewards import host
from smart_grpo_jax.rewards.base import Reward, nothing
from smart_grpo_jax.rewards.remote import connected


def described(prompts: Sequence[str]) -> PyTree:
    """Nothing for the graph; UserError for a prompt that does not say what its picture must hold."""
    for prompt in prompts:
        if not metadata_of(prompt).get("include"):
            raise UserError(
                f'reward geneval: prompt "{prompt:.40}" has no metadata "include", want prompts from a '
                ".jsonl file in GenEval's form"
            )
    return {}


def build(
    path: str | None = None,
    dtype: str = "float32",
    limits: Host | None = None,
    url: str = "",
    reward: str = "",
    strict: bool = False,
    key_env: str = "",
    breaker: int = 3,
    cooldown: float = 10.0,
) -> Reward:
    """The graded score, or with `strict` GenEval's own 0 or 1; the other one is logged."""
    limits = limits or Host()
    client = connected("geneval", path, limits, url, reward, key_env, breaker, cooldown)

    def ask(batch: host.Batch) -> list[host.Answer]:
        both = [(a, {"graded": a.score, "strict": a.parts.get("strict")}) for a in client.ask(batch)]
        return [
            a._replace(score=parts["strict"] if strict else parts["graded"], parts=parts) for a, parts in both
        ]

    scorer = host.scorer(ask, limits, ("graded", "strict"))
    return Reward("geneval", {}, described, nothing().score, uses_prompt=True, host=scorer)
