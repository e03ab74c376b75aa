"""A learned reward: what won with the exact one, trained on a distilled ImageReward and judged by both.

For      whether candidates as credit, and the loss without a likelihood, hold where the reward can be gamed.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/learned.py --seed=200
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   candidates as credit raise the learned reward fastest, behind NFT by the exact one at half cost.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does what won on the exact reward win on a learned one?",
    against="windowed",
    by_size={
        "shapes": {"eval.seeds": 1} | ways.trained_on("shapes_image_reward", "shapes", "shapes_aesthetic"),
        "sd35": ways.trained_on("image_reward", "aesthetic", "hps"),
    },
    arms={
        "windowed": Arm(ways.WINDOWED | {"prompts.groups": 6, "eval.every": 16}, longer=8 / 3),
        "nft": Arm(ways.NFT | ways.PLAIN_ODE | {"prompts.groups": 6, "eval.every": 12}, longer=2.0),
        "look_3": Arm(ways.LOOK_3 | {"eval.every": 18}, longer=3.0),
    },
)

get_config = EXPERIMENT.get_config
