"""Candidates as credit: the states' own candidates as groups, and one-step rewards as differences.

For      the search inside GRPO that needs no finished image, and the ways to give its gain to somebody.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/credit.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   not run yet; docs/reproducing.md will say.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

SPLIT = {"search.members": 0.5, "search.credit": "split"}
EARLY_5X5 = ways.PUBLISHED | ways.EARLY | ways.WINDOWED

EXPERIMENT = Experiment(
    question="Who should get the gain of the search?",
    against="windowed",
    arms={
        "windowed": Arm(ways.WINDOWED),
        **{f"local_{k}": Arm(ways.local(k, [1, 2, 3])) for k in (2, 4, 8)},
        "local_4_slow": Arm(ways.local(4, [1, 2, 3]), faster=0.25),
        "local_4_half": Arm(ways.local(4, [1, 2, 3]), faster=0.5),
        "local_4_decay": Arm(ways.local(4, [1, 2, 3]) | {"train.half_life": 8.0}, sizes=("shapes",)),
        "local_4_later": Arm(ways.local(4, [2, 3, 4])),
        "local_4_late": Arm(ways.local(4, [3, 4, 5])),
        "local_4_best": Arm(ways.local(4, [1, 2, 3]) | {"search.execute": "search"}),
        "difference": Arm(ways.WINDOWED | {"search.credit": "difference"}),
        "difference_later": Arm(ways.window(2, 3) | {"search.credit": "difference"}),
        "offset": Arm(EARLY_5X5 | {"search.credit": "offset"}),
        "offset_small": Arm(EARLY_5X5 | {"search.credit": "offset", "search.offset": 0.3}),
        "split": Arm(EARLY_5X5 | SPLIT),
        "split_best_of_4": Arm(ways.WINDOWED | ways.best_of(4, [1, 2, 3]) | SPLIT),
        "none": Arm(EARLY_5X5),
    },
)

get_config = EXPERIMENT.get_config
