"""Smart-GRPO on the embedded world with learned rewards: the code paths of ImageReward and its companion.

For      what happens when the judge is a model: the proxy is trained on, the exact judges only watch.
Hardware 2 CPU cores, under 3 GB.
Command  python -m smart_grpo_jax.main --config configs/shapes_learned.py
Expect   the proxies' sum 1.68 -> 2.43, and the exact judges follow: graded .536 -> .677 (+.141 +- .053),
         second judge .509 -> .695 (+.187 +- .144); 24 epochs, one seed.

shapes.py with the reward replaced by `shapes_image_reward` + 0.25 `shapes_aesthetic_clip`, in training and in
the search; everything is in the graph. `eval/shapes` and `eval/second` are exact: where `eval/reward` rises
and they do not, the policy has learned the mistakes of its judge.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """shapes.py, judged by the learned rewards."""
    config = runpy.run_path(str(Path(__file__).with_name("shapes.py")))["get_config"]()
    config.rewards = {"shapes_image_reward": 1.0, "shapes_aesthetic_clip": 0.25}
    config.eval_rewards = {"shapes": 1.0, "shapes_aesthetic": 0.0}
    return config
