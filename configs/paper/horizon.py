"""Long horizons: twice the cost of the verdict, where what learns fast may stop or fall.

For      which of the winners goes on rising, and what holds it: a falling rate or a large batch.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/horizon.py --seed=300
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   NFT on small batches falls, on large ones, half-searched or not, it holds, and so does look_3.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

WINDOWED = ways.WINDOWED | {"prompts.groups": 6, "eval.every": 32}
NFT = ways.NFT | ways.PLAIN_ODE
SMALL_NFT = NFT | {"prompts.groups": 6, "eval.every": 24}
LOOK_3 = ways.LOOK_3 | {"eval.every": 36}
HALF_LOOK = {"search.steps": [2, 3], "search.lookahead": 3}


def halving(changes: dict[str, object], longer: float) -> Arm:
    """A rate that halves three times on the way."""
    return Arm(changes | {"train.half_life": 8.0 * longer}, longer=longer, sizes=("shapes",))


EXPERIMENT = Experiment(
    question="What goes on rising when there is twice the budget?",
    against="windowed",
    by_size={"shapes": {"eval.seeds": 1}},
    arms={
        "windowed": Arm(WINDOWED, longer=16 / 3),
        "windowed_decay": halving(WINDOWED, 16 / 3),
        "nft": Arm(SMALL_NFT, longer=4.0),
        "nft_decay": halving(SMALL_NFT, 4.0),
        "nft_large": Arm(NFT | {"eval.every": 9}, longer=1.5),
        "look_3": Arm(LOOK_3, longer=6.0),
        "look_3_decay": halving(LOOK_3, 6.0),
        "half_searched": Arm(ways.NFT | ways.window(1, 2) | ways.HALF, longer=9 / 8),
        "half_look_3": Arm(ways.NFT | ways.window(2, 2) | ways.HALF | HALF_LOOK),
    },
)

get_config = EXPERIMENT.get_config
