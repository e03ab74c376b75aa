"""Everything that can be wrong with a config without looking at a device or at weights."""

from __future__ import annotations

from pathlib import Path

from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.data import prompts
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.rewards import base, mixture


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
        for name, entry in getattr(config, field).items():
            kind = mixture.options_of(entry).get("kind") or name
            if base.known(kind, f"{field}.{name}" if kind != name else field) not in base.REWARDS:
                base.builder(kind)  # the user's own module is imported here
    check_hosts(config)


def check_hosts(config: Config) -> None:
    """A reward outside the graph judges finished images: it cannot be asked during a rollout."""
    searching, credit = searched_steps(config), config.search.credit
    if searching and (asked := mixture.outside(config.search_reward or config.rewards)):
        got = "" if config.search_reward else "nothing, so the search would ask "
        raise UserError(
            f"search_reward: got {got}{asked[0]}, which judges finished images only; wanted rewards in the "
            "graph (try search_reward.shapes=1), or search.rounds=0"
        )
    if (credit == "difference" or (credit == "local" and searching)) and (
        asked := mixture.outside(config.rewards)
    ):
        raise UserError(
            f"search.credit: got {credit}, which rewards one-step decodes, and {asked[0]} judges finished "
            "images only: wanted none, offset or split"
        )
