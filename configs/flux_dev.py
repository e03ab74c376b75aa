"""FLUX.1-dev: Smart-GRPO or Flow-GRPO, 512 or 1024 px, LoRA or all weights.

For      FLUX as a policy: guidance is an input of the network, so a step costs one call.
Hardware one accelerator that holds the table's weights and state and the activations of a piece.
Command  python -m smart_grpo_jax.main --config=configs/flux_dev.py:WORDS --config.model.path=DIR
         WORDS: smart_grpo or flow_grpo, 512 or 1024, lora or full; the first of each is the default.
         Without model.path the hub id is looked up in the local cache.
Expect   not measured: no run with the real weights has been made here. What the networks compute is
         compared with diffusers on random weights of the same format; `--mode=eval` scores the base.

Counted by `python benchmarks/sizes.py configs/flux_dev.py:WORDS`; activations come on top:

  words                  trained  weights + state  TFLOP/forward  calls an epoch + backward   PFLOP
  smart_grpo,512,lora         90 M     24.1 + 1.4  GB      21.50          108,288 + 10,368    2,995
  smart_grpo,512,full     11,901 M     24.1 + 190.4GB      21.50          108,288 + 10,368    2,995
  smart_grpo,1024,lora        90 M     24.1 + 1.4  GB      74.38           79,488 + 10,368    8,070
  smart_grpo,1024,full    11,901 M     24.1 + 190.4GB      74.38           79,488 + 10,368    8,070
  flow_grpo,512,lora          90 M     24.1 + 1.4  GB      21.50           21,888 + 10,368      919
  flow_grpo,512,full      11,901 M     24.1 + 190.4GB      21.50           21,888 + 10,368      919
  flow_grpo,1024,lora         90 M     24.1 + 1.4  GB      74.38           21,888 + 10,368    3,183
  flow_grpo,1024,full     11,901 M     24.1 + 190.4GB      74.38           21,888 + 10,368    3,183

The reward that needs no checkpoint is compressibility; name others with --config.rewards.NAME=WEIGHT.
Prompts are the embedded world's, in GenEval's manner; a file of your own with --config.prompts.source.
"""

from ml_collections import ConfigDict

from smart_grpo_jax.core import recipes


def get_config(words: str = "") -> ConfigDict:
    """Mesh and pieces as the devices allow; the backward pass keeps one block's activations."""
    chosen = recipes.choices(words, recipes.WORDS)
    config = recipes.RECIPES[chosen["method"]]()
    config.model.path = "black-forest-labs/FLUX.1-dev"
    config.model.resolution = int(chosen["side"])
    config.model.t5_length = 512
    config.sampler.guidance = config.sampler.eval_guidance = 3.5
    config.sampler.eval_steps = 28
    config.rewards, config.eval_rewards = {"compressibility": 1.0}, {}
    recipes.fine_tuning(config, chosen["weights"])
    recipes.as_it_fits(config)
    return config
