"""Stable Diffusion 3.5 Medium: Smart-GRPO or Flow-GRPO, 512 or 1024 px, LoRA or all weights.

For      the paper's own model; 48 prompts × 24 images an epoch, as Flow-GRPO publishes it.
Hardware @HARDWARE@
Command  python -m smart_grpo_jax.main --config=configs/sd35_medium.py:WORDS --config.model.path=DIR
         WORDS: one of smart_grpo, flow_grpo; one of 512, 1024; one of lora, full (the first is the default)
Expect   not measured: no run with real weights has been made. Expect what `--mode=eval` says of epoch 0.

The reward that needs no checkpoint is compressibility; name your own with --config.rewards.NAME=WEIGHT.
Prompts are the embedded world's, in GenEval's manner; a file of your own with --config.prompts.source.
"""

from ml_collections import ConfigDict

from smart_grpo_jax.core import recipes


def get_config(words: str = "") -> ConfigDict:
    """Groups are rolled out a few at a time; the backward pass keeps one block's activations."""
    chosen = recipes.choices(
        words, {"method": recipes.METHODS, "side": recipes.SIDES, "weights": recipes.WEIGHTS}
    )
    config = recipes.RECIPES[chosen["method"]]()
    config.model.path = "stabilityai/stable-diffusion-3.5-medium"
    config.model.resolution = int(chosen["side"])
    recipes.fine_tuning(config, chosen["weights"])
    config.rewards = {"compressibility": 1.0}
    config.eval_rewards = {"shapes_aesthetic": 0.0}
    large = chosen["side"] == "1024"
    config.memory.rollout = 1 if large else 4
    config.memory.decode = config.memory.reward = 4 if large else 16
    config.memory.train = 4 if large else 16
    config.search.chunk = 1 if large else 4
    config.memory.remat = "full"
    return config
