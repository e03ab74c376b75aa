"""Who gets the gain: nobody, the searched steps, a part of the group; or no search, and decodes compared.

For      whether a search whose group shares its gain can be made to pay by giving the gain to somebody.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/gain.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   uncredited the search does harm (.04); imitated (offset) it does none, and gains nothing shown.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

SEARCHED = ways.best_of(4, [2, 3, 4])

EXPERIMENT = Experiment(
    question="Who should get the gain of the search?",
    against="windowed",
    common=ways.WINDOWED,
    by_size={"shapes": ways.SMALL},
    arms={
        "windowed": Arm(),
        "none": Arm(SEARCHED),
        "offset": Arm(SEARCHED | {"search.credit": "offset"}),
        "offset_small": Arm(SEARCHED | {"search.credit": "offset", "search.offset": 0.3}),
        "split": Arm(SEARCHED | {"search.credit": "split", "search.members": 0.5}),
        "difference": Arm({"search.credit": "difference"}),
    },
)

get_config = EXPERIMENT.get_config
