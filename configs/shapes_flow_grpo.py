"""Flow-GRPO on the embedded world: the same loop without the search."""

from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs


def get_config() -> ConfigDict:
    """Noise at every step but the last, the first nine trained, no search."""
    config = configs.default()
    config.prompts.groups, config.prompts.members = 16, 12
    config.sampler.eval_steps = 20
    config.adapter.kind = "full"
    config.search.rounds = 0
    config.train.epochs = 40
    config.train.beta2 = 0.99
    config.train.clip = 1e-3
    config.train.weight_decay = 0.0
    config.train.ema.every = 1
    config.train.ema.decay = 0.8
    config.checkpoint.every = 10
    config.eval.every = 10
    return config
