"""Published recipes, and the arguments of a config file: `--config=configs/sd35_medium.py:1024,full`.

A recipe fills in what its paper's code does; a config file adds the model and what its hardware needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError, nearest

WORDS: Mapping[str, tuple[str, ...]] = {
    "method": ("smart_grpo", "flow_grpo"),
    "side": ("512", "1024"),
    "weights": ("lora", "full"),
}
"""What the configs of the published models can be asked for; the first of each is the default."""


def choices(argument: str, groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """One word of each group; the first of a group where the argument has none.

    choices("1024,full", {"side": ("512", "1024"), "weights": ("lora", "full")})
        -> {"side": "1024", "weights": "full"}
    """
    found = {name: words[0] for name, words in groups.items()}
    home = {word: name for name, words in groups.items() for word in words}
    given: set[str] = set()
    for word in filter(None, (part.strip() for part in argument.split(","))):
        if word not in home:
            raise UserError(f'--config: got argument "{word}" ({nearest(word, home)})')
        if home[word] in given:
            words = " or ".join(groups[home[word]])
            raise UserError(f'--config: got argument "{word}" beside "{found[home[word]]}", wanted {words}')
        given.add(home[word])
        found[home[word]] = word
    return found


def flow_grpo() -> ConfigDict:
    """Flow-GRPO as published for SD3.5-M: 48 groups of 24, 10 steps to learn and 40 to evaluate, LoRA. It is
    Smart-GRPO without rounds: one program serves both."""
    config: Any = configs.default()
    config.prompts.groups, config.prompts.members = 48, 24
    config.sampler.steps, config.sampler.eval_steps = 10, 40
    config.sampler.guidance = config.sampler.eval_guidance = 4.5
    config.sampler.transition, config.sampler.noise_level = "flow", 0.7
    config.model.dtype, config.model.t5_length = "bfloat16", 128
    config.adapter.kind, config.adapter.rank, config.adapter.alpha = "lora", 32, 64.0
    config.search.rounds = 0
    config.search.space, config.search.returns, config.search.steps = "latent", "mean", "late"
    config.train.loss, config.train.clip = "ppo", 1e-4
    config.train.learning_rate, config.train.updates_per_epoch = 3e-4, 2
    config.train.ema.decay, config.train.ema.every = 0.9, 8
    return config


def smart_grpo() -> ConfigDict:
    """Algorithm 1 as published, on top of Flow-GRPO: 5 rounds of 5 at the late steps, the mean executed."""
    config: Any = flow_grpo()
    config.search.rounds, config.search.candidates, config.search.elite = 5, 5, 0.5
    return config


def shapes_flow_grpo() -> ConfigDict:
    """Flow-GRPO on the embedded world: 16 groups of 12, no guidance, all weights, noise at every step."""
    config: Any = configs.default()
    config.prompts.groups, config.prompts.members = 16, 12
    config.sampler.guidance = config.sampler.eval_guidance = 1.0
    config.sampler.eval_steps = 20
    config.adapter.kind = "full"
    config.search.rounds = 0
    config.train.epochs = 24
    config.train.learning_rate = 2e-4
    config.train.beta2 = 0.99
    config.train.clip = 0.05
    config.train.weight_decay = 0.0
    config.train.ema.every, config.train.ema.decay = 1, 0.8
    config.checkpoint.every = 8
    return config


RECIPES = {"smart_grpo": smart_grpo, "flow_grpo": flow_grpo}


def fine_tuning(config: Any, weights: str) -> None:
    """LoRA at its published rate, or all weights at a thirtieth of it: a full update moves every weight."""
    config.adapter.kind = weights
    if weights == "full":
        config.train.learning_rate = 1e-5


def as_it_fits(config: Any) -> None:
    """As much in one call of a network, and as few copies of its weights, as the devices allow
    (docs/plan.md); the backward pass recomputes."""
    for name in ("rollout", "decode", "reward", "train"):
        config.memory[name] = "auto"
    config.search.chunk = config.mesh.fsdp = "auto"
    config.memory.remat = "full"
