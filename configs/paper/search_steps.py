"""Where to search: early steps, which decide the picture, against late ones, which are judged well.

For      the published search at other steps, and the cheapest search that gains as much while sampling.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/search_steps.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no difference shown at any step; the cheap search makes an epoch 1.5 times as dear, 5 x 5 early 3.1.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="At which steps does the search pay?",
    against="late",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    arms={
        "none": Arm(),
        "late": Arm(ways.PUBLISHED),
        "early": Arm(ways.PUBLISHED | ways.EARLY),
        "early_cheap": Arm(ways.best_of(4, "early") | {"search.lookahead": 3}),
        "first": Arm(ways.PUBLISHED | {"search.steps": [0, 1]}),
        "middle": Arm(ways.PUBLISHED | {"search.steps": [3, 4, 5]}),
    },
)

get_config = EXPERIMENT.get_config
