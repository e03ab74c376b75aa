"""Flow-SDE, CPS and Dance: with residual noise in the last images, and without.

For      whether the noise that Flow-SDE leaves in the last images is a channel of reward hacking.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/transitions.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no difference shown between the three, nor by the search in any of them; wide intervals.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

CPS = {"sampler.transition": "cps", "sampler.noise_level": 0.8}
DANCE = {"sampler.transition": "dance", "sampler.noise_level": 0.3}

EXPERIMENT = Experiment(
    question="Does the stochastic step matter, with and without the search?",
    against="flow",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    arms={
        "flow": Arm(),
        "cps": Arm(CPS),
        "dance": Arm(DANCE),
        "flow_searched": Arm(ways.PUBLISHED),
        "cps_searched": Arm(ways.PUBLISHED | CPS),
        "dance_searched": Arm(ways.PUBLISHED | DANCE),
    },
)

get_config = EXPERIMENT.get_config
