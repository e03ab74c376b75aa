"""Figure 1, second reward: Flow-GRPO and Smart-GRPO trained on the aesthetic predictor.

For      the reward per epoch of both, and what judges that are not trained on say of it.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/figure1_aesthetic.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   the trained reward is ahead per epoch with the search, the exact one .09 behind; five seeds.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does the search learn faster per epoch on a learned reward?",
    against="flow_grpo",
    epochs={"shapes": 8},
    by_size={
        "shapes": ways.DEAR | ways.trained_on("shapes_aesthetic_clip", "shapes", "shapes_aesthetic"),
        "sd35": ways.trained_on("aesthetic", "image_reward", "hps"),
    },
    seeds=5,
    arms={"flow_grpo": Arm(), "smart_grpo": Arm(ways.PUBLISHED)},
)

get_config = EXPERIMENT.get_config
