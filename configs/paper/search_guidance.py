"""Guidance inside the search: the policy is guided, its candidates need not be.

For      what leaving guidance out of the candidates, half of their cost, does to the gain.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/search_guidance.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   candidates without guidance do as well; neither is ahead of no search at equal cost.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Do candidates need guidance?",
    against="as_sampler",
    common=ways.NFT | ways.window(1, 2) | ways.HALF,
    by_size={"shapes": ways.SMALL | {"sampler.guidance": 2.0, "sampler.eval_guidance": 2.0}},
    arms={
        "no_search": Arm({"search.rounds": 0}),
        "as_sampler": Arm(),
        "none": Arm({"search.guidance": 1.0}),
    },
)

get_config = EXPERIMENT.get_config
