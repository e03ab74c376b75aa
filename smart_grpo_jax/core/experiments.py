"""Experiments: a question, and one config per line of its answer.

    EXPERIMENT = Experiment(
        question="Does iterating beat one shot?",
        against="one_shot",
        arms={"one_shot": Arm(ways.ONE_SHOT), "iterative": Arm(ways.PUBLISHED)},
    )
    get_config = EXPERIMENT.get_config

is a config file: `--config=FILE:iterative,sd35` trains one line, `--mode=experiment --config=FILE` all of
them with several seeds. An arm says only what it changes in the base of its size, `shapes` or `sd35`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from smart_grpo_jax.core import recipes
from smart_grpo_jax.core.errors import UserError, nearest

Changes = Mapping[str, Any]
"""Dotted names of fields and their values."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line: changes of the base, and factors on what has another value in each size."""

    changes: Changes = dataclasses.field(default_factory=dict)
    longer: float = 1.0  # × epochs; 0: the base, evaluated and not trained
    faster: float = 1.0  # × learning rate
    sizes: tuple[str, ...] = ("shapes", "sd35")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question and its lines; `against` is the one that the others are compared with."""

    question: str
    against: str
    arms: Mapping[str, Arm]
    epochs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    common: Changes = dataclasses.field(default_factory=dict)
    by_size: Mapping[str, Changes] = dataclasses.field(default_factory=dict)
    seeds: int = 3
    audit: bool = False  # measured by `--mode=rewards --audit` in the place of training

    def __post_init__(self) -> None:
        if self.against not in self.arms:
            raise UserError(f'experiment: against "{self.against}" ({nearest(self.against, self.arms)})')
        words = set(BASES) & set(self.arms)
        if words:
            raise UserError(f"experiment: got an arm named {words.pop()}, wanted another name than a size")

    def words(self, text: str) -> tuple[str, str]:
        """(arm, size) of a config's words; the arm compared against, and `shapes`, where none is given."""
        order = [self.against, *(name for name in self.arms if name != self.against)]
        found = recipes.choices(text, {"arm": order, "size": tuple(BASES)})
        return found["arm"], found["size"]

    def names(self, size: str) -> list[str]:
        """The arms that exist in a size, in their order."""
        return [name for name, arm in self.arms.items() if size in arm.sizes]

    def get_config(self, words: str = "") -> ConfigDict:
        """The config of one arm in one size."""
        name, size = self.words(words)
        arm = self.arms[name]
        if size not in arm.sizes:
            raise UserError(f"--config: got {name},{size}, wanted {name} in size {' or '.join(arm.sizes)}")
        config: Any = BASES[size]()
        config.train.epochs = self.epochs.get(size, config.train.epochs)
        for changes in (self.common, self.by_size.get(size, {}), arm.changes):
            apply(config, changes)
        config.train.epochs = round(config.train.epochs * arm.longer)
        config.train.learning_rate *= arm.faster
        return config


def apply(config: Any, changes: Changes) -> None:
    """Set the named fields; a name that is not there is an error, a table of rewards is replaced whole."""
    for name, value in changes.items():
        *parts, last = name.split(".")
        section = config
        for part in parts:
            section = section[part] if part in section else None
            if section is None:
                raise UserError(f"experiment: no such field {name}")
        if last not in section:
            raise UserError(f"experiment: no such field {name} ({nearest(last, section)})")
        with section.unlocked():
            section[last] = ConfigDict(dict(value), type_safe=False) if isinstance(value, Mapping) else value


def shapes() -> ConfigDict:
    """Flow-GRPO as published, on the embedded world."""
    config: Any = recipes.shapes_flow_grpo()
    config.checkpoint.keep = 1
    # All held-out prompts, each once: 240 in equal shares of the tasks hold one prompt 40 times.
    config.eval.every, config.eval.prompts, config.eval.seeds = 6, 0, 2
    config.log.tensorboard = False
    return config


def sd35() -> ConfigDict:
    """Flow-GRPO as published for SD3.5-M, with the paper's rewards and 2,700 prompts of GenEval's kind."""
    config: Any = recipes.flow_grpo()
    config.model.path, config.model.resolution = "stabilityai/stable-diffusion-3.5-medium", 512
    config.prompts.source, config.eval.source, config.eval.prompts = "geneval:train", "geneval:heldout", 0
    config.rewards = {"image_reward": 1.0}
    config.eval_rewards = {"image_reward": 1.0, "aesthetic": 0.0, "hps": 0.0}
    config.train.epochs = 360
    config.checkpoint.every, config.checkpoint.keep = 20, 1
    config.eval.every = 20
    recipes.fine_tuning(config, "lora")
    recipes.as_it_fits(config)
    return config


BASES: Mapping[str, Callable[[], ConfigDict]] = {"shapes": shapes, "sd35": sd35}
"""What every arm starts from, by size."""
