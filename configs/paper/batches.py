"""Small batches: a third of the images and three times the epochs, at the same cost.

For      whether what limits learning is the noise of a gradient or the number of steps.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/batches.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   NFT leads early; candidates seen by three calls hold, by one step one seed of three collapses.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

SMALL = {"prompts.groups": 6}
CANDIDATES = ways.local(4, [3, 4])

EXPERIMENT = Experiment(
    question="Many images and few steps, or few images and many steps?",
    against="windowed_small",
    arms={
        "windowed": Arm(ways.WINDOWED, faster=2.0),
        "windowed_small": Arm(ways.WINDOWED | SMALL, longer=2.67),
        "nft_small": Arm(ways.NFT | ways.PLAIN_ODE | SMALL, longer=2.4),
        "local": Arm(CANDIDATES | {"prompts.members": 9}, faster=2.0),
        "local_small": Arm(CANDIDATES | {"prompts.members": 3}, longer=3.0),
        "look_3_small": Arm(ways.LOOK_3, longer=3.0),
        "look_6": Arm(CANDIDATES | {"prompts.members": 4, "search.lookahead": 6}, faster=2.0),
        "look_6_small": Arm(ways.LOOK_3 | {"search.lookahead": 6}, longer=2.0),
    },
)

get_config = EXPERIMENT.get_config
