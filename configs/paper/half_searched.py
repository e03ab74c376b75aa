"""Half-searched groups under the likelihood-free loss, against the same noise without a search.

For      the lead of the prototypes: suggestive there, with intervals here.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/half_searched.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no: best of 2 and 4 no difference shown at equal cost, best of 8 behind; no gain as a curriculum.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Do half-searched groups beat plain ones at equal cost?",
    against="no_search",
    common=ways.NFT | ways.window(1, 2),
    by_size={"shapes": ways.SMALL},
    arms={
        "no_search": Arm(longer=1.5),
        "plain_ode": Arm({"sampler.transition": "ode", "sampler.window.kind": "all"}, longer=1.5),
        "windowed_ppo": Arm(
            {"train.loss": "ppo", "train.updates_per_epoch": 2, "train.inner_epochs": 1} | ways.WINDOWED,
            faster=2.0,
            longer=2,
        ),
        "best_of_2": Arm(ways.HALF | {"search.candidates": 2}),
        "best_of_4": Arm(ways.HALF),
        "best_of_8": Arm(ways.HALF | {"search.candidates": 8}),
        "best_of_4_then_none": Arm(ways.HALF | {"search.until": 12}, sizes=("shapes",)),
        "best_of_4_middle": Arm(ways.HALF | ways.window(4, 2) | {"search.steps": [4, 5]}),
        "best_of_4_late": Arm(ways.HALF | ways.window(7, 2) | {"search.steps": [7, 8]}),
        "best_of_4_third_step": Arm(ways.HALF | ways.window(1, 3) | {"search.steps": [1, 2, 3]}),
    },
)

get_config = EXPERIMENT.get_config
