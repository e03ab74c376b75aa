"""Smart-GRPO on the embedded world, in a setting that no other of its cost is shown to beat here.

For      the demonstration: minutes on a laptop, from a base model that listens badly to one that listens.
Hardware 2 CPU cores, under 3 GB.
Command  python -m smart_grpo_jax.main --config configs/shapes.py
Expect   graded .536 -> .64 to .67 by seed in 3 minutes from an empty compile cache; the band of six runs is
         configs/expected/shapes.json. Plain NFT rollouts of the same cost are level: docs/reproducing.md.

At two early steps (t = 0.89 and 0.78, where the layout is decided) half of each group executes the best
of 4 searched noises, the other half plain noise; the rest of the path is the ODE. All finished images of
a prompt share one baseline, so the search earns what it gains, and the likelihood-free loss (NFT) learns
from the finished images alone: searched noise needs no density.
"""

from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs


def get_config() -> ConfigDict:
    """Best of 4 at steps 1 and 2 for half of the members; no guidance in training or evaluation."""
    config = configs.default()
    config.prompts.groups, config.prompts.members = 16, 12
    config.sampler.guidance = config.sampler.eval_guidance = 1.0
    config.sampler.eval_steps = 20
    config.sampler.window.kind = "fixed"
    config.sampler.window.start, config.sampler.window.size = 1, 2
    config.adapter.kind = "full"
    config.search.rounds, config.search.candidates = 1, 4
    config.search.returns = "best"
    config.search.steps = [1, 2]
    config.search.members = 0.5
    config.train.loss = "nft"
    config.train.epochs = 24
    config.train.updates_per_epoch, config.train.inner_epochs = 1, 4
    config.train.beta2 = 0.99
    config.train.weight_decay = 0.0
    config.train.ema.every, config.train.ema.decay = 1, 0.8
    config.checkpoint.every = 8
    config.eval.every = 8
    return config
