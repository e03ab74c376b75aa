"""What a run that is taken up again must have kept: the fields that decide what is computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import Config

RESUMABLE = (
    "train.epochs",
    "train.check_rewards",
    "model.attention",
    "log.",
    "checkpoint.",
    "memory.",
    "mesh.",
    "host.",
    "audit.",
    "pretrain.",
)
"""Fields that may change when a run is taken up again: none of them changes what is computed."""

WHERE_REWARDS_ARE = re.compile(
    r"(rewards|search_reward|eval_rewards)\..*\."
    r"(url|key_env|batch|workers|timeout|deadline|retries|breaker|cooldown)"
)
"""Options of a reward that say where and how patiently it is asked, not what: these may change, too."""

TABLES = ("rewards", "search_reward", "eval_rewards")
"""Fields whose names are the user's own."""


def semantic(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config dict that must not change when a run is resumed.

    A field that an older version did not know counts with its default: what it did then.
    """
    known = schema.flatten(schema.to_dict(Config()))
    flat = {k: v for k, v in known if k.split(".")[0] not in TABLES} | dict(schema.flatten(config))
    return {
        k: v for k, v in flat.items() if not k.startswith(RESUMABLE) and not WHERE_REWARDS_ARE.fullmatch(k)
    }
