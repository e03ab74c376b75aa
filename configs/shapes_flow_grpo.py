"""Flow-GRPO on the embedded world: the loop of shapes.py without the search.

For      the baseline of shapes.py: equal prompts, groups, epochs and evaluation noise.
Hardware 2 CPU cores, under 3 GB.
Command  python -m smart_grpo_jax.main --config configs/shapes_flow_grpo.py
Expect   see the table in README.md; the times there are of 2 cores.

Noise and training are restricted to the three steps that decide the layout (t = 0.89, 0.78, 0.67): with
noise at all steps, as published, the same number of network calls teaches this model less.
"""

from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs


def get_config() -> ConfigDict:
    """PPO on the finished images' rewards; no guidance in training or evaluation."""
    config = configs.default()
    config.prompts.groups, config.prompts.members = 16, 12
    config.sampler.guidance = config.sampler.eval_guidance = 1.0
    config.sampler.eval_steps = 20
    config.sampler.window.kind = "fixed"
    config.sampler.window.start, config.sampler.window.size = 1, 3
    config.adapter.kind = "full"
    config.search.rounds = 0
    config.train.epochs = 24
    config.train.learning_rate = 2e-4
    config.train.beta2 = 0.99
    config.train.clip = 0.05
    config.train.weight_decay = 0.0
    config.train.ema.every, config.train.ema.decay = 1, 0.8
    config.checkpoint.every = 8
    config.eval.every = 8
    return config
