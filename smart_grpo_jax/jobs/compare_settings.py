"""The settings of a run by their dotted names: what makes two runs the same method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smart_grpo_jax.core import resumable, schema
from smart_grpo_jax.core.config import Config

NOT_COMPARED = ("seed", "search.chunk", "model.attention")
"""Fields in which runs of one arm may differ: the seed, and what a machine needs and only rounding sees."""


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """All fields, the defaults filled in. A table of rewards is the run's own or, where it has none, the
    default one: never both together."""
    own = lambda name: name.split(".")[0] in resumable.TABLES and name.split(".")[0] in config
    defaults = {k: v for k, v in schema.flatten(schema.to_dict(Config())) if not own(k)}
    return defaults | dict(schema.flatten(config))


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run computes, but for its seed."""
    whole = filled(config)
    kept = resumable.semantic(whole) | {"train.epochs": whole["train.epochs"]}
    return {name: value for name, value in kept.items() if name not in NOT_COMPARED}


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults, None for a default reward that is not there: a field that is
    new since then, and left alone, is none of them."""
    mine, plain = settings(config), settings({})
    return {k: mine.get(k) for k in sorted({*mine, *plain}) if mine.get(k) != plain.get(k)}


def stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields from which `filled` makes the same again: those that are not the defaults, and the whole of
    a table in which anything is not."""
    plain = schema.to_dict(Config())
    tables = {name for name in resumable.TABLES if name in config and config[name] != plain[name]}
    defaults = dict(schema.flatten(plain))
    keep = lambda name, value: name not in defaults or defaults[name] != value or name.split(".")[0] in tables
    return {name: value for name, value in schema.flatten(config) if keep(name, value)}
