"""The elite fraction of the published search, and a floor under its spread.

For      whether P = 1/2, which the paper does not state, matters.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/elite.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no difference shown between a quarter, half and three quarters, a floor or smoothing.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Which share of the candidates should be kept?",
    against="p50",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    common=ways.PUBLISHED | ways.EARLY | {"search.candidates": 8, "search.rounds": 3},
    arms={
        "p25": Arm({"search.elite": 0.25}),
        "p50": Arm(),
        "p75": Arm({"search.elite": 0.75}),
        "p25_floor": Arm({"search.elite": 0.25, "search.sigma_floor": 0.3}),
        "p50_smooth": Arm({"search.smoothing": 0.5}),
    },
)

get_config = EXPERIMENT.get_config
