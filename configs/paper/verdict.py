"""The verdict: what won its own experiment with seed 0, against the tuned baseline, with fresh seeds.

For      whether candidates as credit, or a loss without a likelihood, beat Flow-GRPO at equal cost.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/verdict.py --seed=200
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   not run yet; docs/reproducing.md will say.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does anything found here beat the tuned Flow-GRPO at equal cost?",
    against="steps_2_4_double",
    seeds=5,
    arms={
        "published": Arm(),
        "steps_2_4_double": Arm(ways.window(2, 3), faster=2.0, longer=2.0),
        "steps_1_4_double": Arm(ways.window(1, 4), faster=2.0, longer=5 / 3),
        "nft_fast": Arm(ways.NFT | ways.PLAIN_ODE, faster=2.0, longer=1.5),
        "branches": Arm(
            ways.local(4, [3, 4]) | {"search.lookahead": 6, "prompts.members": 4}, faster=2.0, longer=2.0
        ),
    },
)

get_config = EXPERIMENT.get_config
