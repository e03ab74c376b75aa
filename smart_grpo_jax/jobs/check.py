"""Everything that can be wrong with a config without looking at a device or at weights."""

from __future__ import annotations

import os
from pathlib import Path

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.data import prompts
from smart_grpo_jax.rewards import base


def check(config: Config) -> None:
    """One UserError for a model, prompts or rewards that do not exist."""
    path = config.model.path
    if path != "shapes" and not os.path.isfile(Path(path) / "model_index.json"):
        raise UserError(f'model.path: got "{path}", wanted "shapes" or a folder with a model_index.json')
    prompts.check(config.prompts.source)
    prompts.check(config.eval.source, "eval.source")
    for field in ("rewards", "search_reward", "eval_rewards"):
        for name in getattr(config, field):
            base.known(name, field)
