"""Smart-GRPO exactly as published, on the embedded world.

For      what Algorithm 1 does when it is read literally, beside shapes.py and shapes_flow_grpo.py.
Hardware 2 CPU cores, under 3 GB.
Command  python -m smart_grpo_jax.main --config configs/shapes_paper.py
Expect   graded .536 -> .554 after 12 epochs and 10 minutes: no difference shown, one seed.

Candidates perturb the state itself and are decoded at its own time; 5 rounds of 5, the better half kept,
the mean executed; all members searched, at the late steps (t ≤ 0.61, where the paper finds the one-step
decode reliable), no extra credit. Noise and training at every step but the last. What the paper leaves
open is listed in docs/algorithm.md, section 5.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """shapes_flow_grpo.py with the published search, over the whole path."""
    config = runpy.run_path(str(Path(__file__).with_name("shapes_flow_grpo.py")))["get_config"]()
    config.sampler.window.kind = "all"
    config.search.rounds, config.search.candidates, config.search.elite = 5, 5, 0.5
    config.search.space = "latent"
    config.search.returns = "mean"
    config.search.steps = "late"
    config.search.credit = "none"
    config.train.epochs = 12
    return config
