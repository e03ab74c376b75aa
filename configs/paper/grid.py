"""K × N in training: candidates and rounds of the search on half of each group.

For      which size of the search pays while training, at equal cost.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/grid.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   the policies end alike, so at equal cost the larger search is behind: 8 x 4 by .07.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

GRID = {
    f"k{k}n{n}": Arm(
        ways.HALF
        | {
            "search.candidates": k,
            "search.rounds": n,
            "search.returns": "best" if n == 1 else "mean",
            "search.elite": 0.5 if k > 3 else 1.0,
        }
    )
    for k in (2, 4, 8)
    for n in (1, 2, 4)
    if not (k == 2 and n > 1)
}

EXPERIMENT = Experiment(
    question="How many candidates and rounds pay?",
    against="no_search",
    common=ways.NFT | ways.window(1, 2),
    by_size={"shapes": ways.SMALL},
    arms={"no_search": Arm(longer=1.5), **GRID},
)

get_config = EXPERIMENT.get_config
