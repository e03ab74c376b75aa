"""Long horizons: twice the cost of the verdict, where what learns fast may stop or fall.

For      which of the winners goes on rising, and whether a falling rate or the distance to the base holds it.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/horizon.py --seed=300
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   not run yet; docs/reproducing.md will say.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

NFT = ways.NFT | ways.PLAIN_ODE
LOOK_3 = ways.local(4, [3, 4]) | {"prompts.members": 2, "search.lookahead": 3, "eval.every": 36}

EXPERIMENT = Experiment(
    question="What goes on rising when there is twice the budget?",
    against="windowed",
    by_size={"shapes": {"eval.seeds": 1}},
    arms={
        "windowed": Arm(ways.WINDOWED | {"prompts.groups": 6, "eval.every": 32}, longer=16 / 3),
        "nft": Arm(NFT | {"prompts.groups": 6, "eval.every": 24}, longer=4.0),
        "look_3": Arm(LOOK_3, longer=6.0),
        "look_3_decay": Arm(LOOK_3 | {"train.half_life": 48.0}, longer=6.0, sizes=("shapes",)),
        "half_searched": Arm(ways.NFT | ways.window(1, 2) | ways.HALF, longer=9 / 8),
    },
)

get_config = EXPERIMENT.get_config
