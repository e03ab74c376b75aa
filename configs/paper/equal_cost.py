"""Equal cost: what else could be bought with the calls that the search spends?

For      the published search against longer training, larger groups and best-of-KN noise at the same cost.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/equal_cost.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   more epochs are .07 ahead of the published search at equal cost, a window with them .13.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does the published search win at equal cost?",
    against="more_epochs",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    arms={
        "smart_grpo": Arm(ways.PUBLISHED),
        "more_epochs": Arm({"eval.every": 10}, longer=5),
        "more_groups": Arm({"prompts.groups": 48}, longer=0.625),
        "larger_groups": Arm({"prompts.members": 96}, longer=0.625),
        "best_of_25": Arm(ways.ONE_SHOT | {"search.returns": "best"}),
        "windowed": Arm(
            ways.WINDOWED | {"train.inner_epochs": 1, "eval.every": 40}, longer=20, sizes=("shapes",)
        ),
        "search_at_evaluation": Arm(ways.PUBLISHED | ways.EARLY | ways.EVALUATED, longer=0),
    },
)

get_config = EXPERIMENT.get_config
