"""Transition against latent space: are candidates judged where they will lead, or around the state?

For      the two readings of the paper's equation 5.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/space.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no difference shown between the two readings, at late steps and at early ones.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Where should candidates be judged?",
    against="latent_late",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    common=ways.PUBLISHED,
    arms={
        "latent_late": Arm(),
        "transition_late": Arm({"search.space": "transition"}),
        "latent_early": Arm(ways.EARLY),
        "transition_early": Arm(ways.EARLY | {"search.space": "transition"}),
    },
)

get_config = EXPERIMENT.get_config
