"""Everything that can be wrong with a config without looking at a device or at weights."""

from __future__ import annotations

from pathlib import Path

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.data import prompts
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.rewards import base


def check(config: Config) -> None:
    """One UserError for a model, prompts or rewards that do not exist."""
    pipeline_folder(config.model.path)
    if config.adapter.init:
        from smart_grpo_jax.hub import adapters

        try:
            adapters.find(Path(config.adapter.init))
        except UserError as error:
            raise UserError(f"adapter.init: {error}") from error
    prompts.check(config.prompts.source)
    prompts.check(config.eval.source, "eval.source")
    for field in ("rewards", "search_reward", "eval_rewards"):
        for name in getattr(config, field):
            base.known(name, field)
