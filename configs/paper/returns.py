"""What the search returns: its mean, a draw from its last law, or the best candidate.

For      the paper's open question of what is executed, at three rounds of four and at one of twelve.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/returns.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no difference shown between mean, draw and best; while sampling there is one.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

THREE_OF_4 = {"search.rounds": 3, "search.candidates": 4}

EXPERIMENT = Experiment(
    question="Which noise should be executed?",
    against="mean",
    common=ways.NFT | ways.window(1, 2) | ways.HALF | THREE_OF_4,
    by_size={"shapes": ways.SMALL},
    arms={
        "mean": Arm({"search.returns": "mean"}),
        "sample": Arm({"search.returns": "sample"}),
        "best": Arm({"search.returns": "best"}),
        "best_of_12": Arm({"search.rounds": 1, "search.candidates": 12, "search.returns": "best"}),
    },
)

get_config = EXPERIMENT.get_config
