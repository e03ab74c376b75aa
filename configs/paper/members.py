"""How much of each group is searched.

For      whether plain members beside searched ones let the search earn what it gains.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/members.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   the more of a group is searched, the worse: all of it .05 behind none at equal cost.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Which share of a group should be searched?",
    against="none",
    common=ways.NFT | ways.window(1, 2) | ways.HALF,
    by_size={"shapes": ways.SMALL},
    arms={
        "none": Arm({"search.rounds": 0}),
        "quarter": Arm({"search.members": 0.25}),
        "half": Arm(),
        "three_quarters": Arm({"search.members": 0.75}),
        "all": Arm({"search.members": 1.0}),
    },
)

get_config = EXPERIMENT.get_config
