"""Negative control: PickScore, for which the paper reports no gain; on shapes the exact aesthetic score.

For      whether the search gains on a reward that says little about the prompt.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/control_pick.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no gain in the reward, as published; the graded one falls by about .10 at equal epochs.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Is there a gain where the reward gives the search little to hold on to?",
    against="flow_grpo",
    epochs={"shapes": 8},
    by_size={
        "shapes": ways.DEAR | ways.trained_on("shapes_aesthetic", "shapes") | {"train.check_rewards": False},
        "sd35": ways.trained_on("pick_score", "image_reward", "aesthetic"),
    },
    arms={"flow_grpo": Arm(), "smart_grpo": Arm(ways.PUBLISHED)},
)

get_config = EXPERIMENT.get_config
