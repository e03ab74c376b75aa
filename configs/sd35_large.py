"""Stable Diffusion 3.5 Large: Smart-GRPO or Flow-GRPO, 512 or 1024 px, LoRA or all weights.

For      the larger model of the paper's table, trained by the same recipe.
Hardware one accelerator that holds the table's weights and state and the activations of a piece.
Command  python -m smart_grpo_jax.main --config=configs/sd35_large.py:WORDS --config.model.path=DIR
         WORDS: smart_grpo or flow_grpo, 512 or 1024, lora or full; the first of each is the default.
         Without model.path the hub id is looked up in the local cache.
Expect   not measured: no run with the real weights has been made here. What the networks compute is
         compared with diffusers on random weights of the same format; `--mode=eval` scores the base.

Counted by `python benchmarks/sizes.py configs/sd35_large.py:WORDS`; activations come on top:

  words                  trained  weights + state  TFLOP/forward  calls an epoch + backward   PFLOP
  smart_grpo,512,lora         47 M     16.6 + 0.8  GB       7.17          216,576 + 20,736    2,071
  smart_grpo,512,full      8,057 M     16.6 + 128.9GB       7.17          216,576 + 20,736    2,071
  smart_grpo,1024,lora        47 M     16.6 + 0.8  GB      30.02          216,576 + 20,736    8,663
  smart_grpo,1024,full     8,057 M     16.6 + 128.9GB      30.02          216,576 + 20,736    8,663
  flow_grpo,512,lora          47 M     16.6 + 0.8  GB       7.17           43,776 + 20,736      614
  flow_grpo,512,full       8,057 M     16.6 + 128.9GB       7.17           43,776 + 20,736      614
  flow_grpo,1024,lora         47 M     16.6 + 0.8  GB      30.02           43,776 + 20,736    2,571
  flow_grpo,1024,full      8,057 M     16.6 + 128.9GB      30.02           43,776 + 20,736    2,571

The reward that needs no checkpoint is compressibility; name others with --config.rewards.NAME=WEIGHT.
Prompts are the embedded world's, in GenEval's manner; a file of your own with --config.prompts.source.
"""

from ml_collections import ConfigDict

from smart_grpo_jax.core import recipes


def get_config(words: str = "") -> ConfigDict:
    """Mesh and pieces as the devices allow; the backward pass keeps one block's activations."""
    chosen = recipes.choices(words, recipes.WORDS)
    config = recipes.RECIPES[chosen["method"]]()
    config.model.path = "stabilityai/stable-diffusion-3.5-large"
    config.model.resolution = int(chosen["side"])
    config.rewards, config.eval_rewards = {"compressibility": 1.0}, {}
    recipes.fine_tuning(config, chosen["weights"])
    recipes.as_it_fits(config)
    return config
