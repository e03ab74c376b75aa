"""FLUX.1-dev as a baseline: evaluation alone, 28 steps, guidance 3.5, 512 or 1024 px.

For      the larger models beside which the paper puts its own.
Hardware 24.1 GB of frozen weights (bfloat16) and the activations of a piece.
Command  python -m smart_grpo_jax.main --config=configs/flux_dev_eval.py --mode=eval --config.model.path=DIR
Expect   not measured: the real weights have not been evaluated here.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(words: str = "") -> ConfigDict:
    """The training config's model and size, sampled as its authors do."""
    training = runpy.run_path(str(Path(__file__).with_name("flux_dev.py")))
    config = training["get_config"](f"flow_grpo,{words}")
    config.sampler.eval_steps, config.sampler.eval_guidance = 28, 3.5
    config.eval.weights = "raw"
    return config
