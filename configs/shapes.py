"""Smart-GRPO on the embedded world, in the setting that learned most here."""

from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs


def get_config() -> ConfigDict:
    """Search at the three early steps; its candidates are the groups that are learned from."""
    config = configs.default()
    config.prompts.groups, config.prompts.members = 16, 8
    config.sampler.guidance = config.sampler.eval_guidance = 2.0
    config.sampler.eval_steps = 20
    config.adapter.kind = "full"
    config.search.rounds, config.search.candidates = 1, 4
    config.search.steps = "early"
    config.search.credit = "local"
    config.search.execute = "random"
    config.train.epochs = 30
    config.train.beta2 = 0.99
    config.train.clip = 0.05
    config.train.weight_decay = 0.0
    config.train.ema.every = 1
    config.train.ema.decay = 0.8
    config.eval.every = 10
    return config
