"""Flow-GRPO on the embedded world: the loop of shapes.py without the search.

For      the baseline of shapes.py: equal prompts, groups, epochs and evaluation noise.
Hardware 2 CPU cores, under 3 GB.
Command  python -m smart_grpo_jax.main --config configs/shapes_flow_grpo.py
Expect   see the table in README.md; the times there are of 2 cores.

Noise and training are restricted to the three steps that decide the layout (t = 0.89, 0.78, 0.67): with
noise at all steps, as published, the same number of network calls teaches this model less.
"""

from ml_collections import ConfigDict

from smart_grpo_jax.core import recipes


def get_config() -> ConfigDict:
    """PPO on the finished images' rewards; no guidance in training or evaluation."""
    config = recipes.shapes_flow_grpo()
    config.sampler.window.kind = "fixed"
    config.sampler.window.start, config.sampler.window.size = 1, 3
    config.eval.every = 8
    return config
