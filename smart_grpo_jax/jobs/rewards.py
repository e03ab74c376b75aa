"""`--mode=rewards`: what can be asked of the rewards of a config before it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import audit, reward_bench, reward_check

QUESTIONS: dict[str, Callable[[Config, str, str], object]] = {
    "check": reward_check.job,
    "bench": lambda config, workdir, examples: reward_bench.job(config),
    "audit": lambda config, workdir, examples: audit.job(config, workdir),
}


def job(config: Config, workdir: str, asked: Sequence[str], examples: str = "") -> None:
    """Answer the switches of the command line, in the order of the table; `examples` is for the check."""
    if not asked:
        wanted = ", ".join(f"--{name}" for name in QUESTIONS)
        raise UserError(f"--mode=rewards: got no question, wanted {wanted}")
    for name, answer in QUESTIONS.items():
        if name in asked:
            answer(config, workdir, examples)
