"""Figure 3: what one step from each state on the way decodes to, and how well its reward judges.

For      the paper's 0.6, read as the time t (a row of the table) and as the noise level a (an arm).
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/figure3.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   rank correlation .72 at t = .56 and .45 at .67, where the search gains most; docs/reproducing.md.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="From which step on does the one-step decode order the images as their rewards will?",
    against="level_7",
    audit=True,
    seeds=1,
    common=ways.PUBLISHED | {"search.steps": "all"},
    arms={
        "level_7": Arm({"sampler.noise_level": 0.7}),
        "level_6": Arm({"sampler.noise_level": 0.6}),
    },
)

get_config = EXPERIMENT.get_config
