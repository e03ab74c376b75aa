"""The verdict: what won its own experiment with seed 0 or 100, against the tuned baseline, with fresh seeds.

For      whether candidates as credit, or a loss without a likelihood, beat Flow-GRPO at equal cost.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/verdict.py --seed=200
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   look_3 and nft .02 above the windowed settings at equal cost, .08 above the published one.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does anything found here beat the tuned Flow-GRPO at equal cost?",
    against="windowed",
    seeds=5,
    arms={
        "published": Arm(longer=0.5),
        "windowed": Arm(ways.WINDOWED | {"prompts.groups": 6, "eval.every": 16}, longer=8 / 3),
        "windowed_double": Arm(ways.WINDOWED, faster=2.0),
        "nft": Arm(ways.NFT | ways.PLAIN_ODE | {"prompts.groups": 6, "eval.every": 12}, longer=2.0),
        "look_3": Arm(ways.LOOK_3 | {"eval.every": 18}, longer=3.0),
        "branches": Arm(ways.LOOK_3 | {"search.lookahead": 6, "eval.every": 12}, longer=2.0),
    },
)

get_config = EXPERIMENT.get_config
