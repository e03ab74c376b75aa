"""Negative control: CLIPScore, for which the paper reports no gain; on shapes compressibility.

For      whether the search gains on a reward that says little about the prompt.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/control_clip.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no gain in the reward, as published; the graded one falls by about .04, which is not shown.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Is there a gain where the reward gives the search little to hold on to?",
    against="flow_grpo",
    epochs={"shapes": 8},
    by_size={
        "shapes": ways.DEAR
        | ways.trained_on("compressibility", "shapes", "shapes_aesthetic")
        | {"train.check_rewards": False},
        "sd35": ways.trained_on("clip_score", "image_reward", "aesthetic"),
    },
    arms={"flow_grpo": Arm(), "smart_grpo": Arm(ways.PUBLISHED)},
)

get_config = EXPERIMENT.get_config
