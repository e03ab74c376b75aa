"""Figure 2a: five rounds of five against one shot of 25, with and without noise of unit length.

For      whether iterating wins, or the length of its noise: one shot returns 0.29 of the length.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/figure2a.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   .025 for the rounds with the published noise, .005 with unit length, both holding 0; five seeds.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does iterating beat one shot, once both execute noise of equal length?",
    against="one_shot",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    seeds=5,
    arms={
        "flow_grpo": Arm(),
        "one_shot": Arm(ways.ONE_SHOT),
        "iterative": Arm(ways.PUBLISHED),
        "one_shot_rms": Arm(ways.ONE_SHOT | ways.UNIT_NOISE),
        "iterative_rms": Arm(ways.PUBLISHED | ways.UNIT_NOISE),
        "best_of_25": Arm(ways.ONE_SHOT | {"search.returns": "best"}),
    },
)

get_config = EXPERIMENT.get_config
