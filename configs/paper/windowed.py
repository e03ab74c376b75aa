"""Windowed Flow-GRPO, the baseline to beat: which steps, which learning rate.

For      tuning the baseline as hard as what is compared with it.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/windowed.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   every window beats all steps at equal cost; twice the rate at steps 2-4 by .07.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

PLACES = ((0, 2), (0, 3), (1, 2), (1, 3), (1, 4), (2, 3))
WINDOWS = {f"steps_{start}_{start + size - 1}": ways.window(start, size) for start, size in PLACES}
RATES = {"half": 0.5, "same": 1.0, "double": 2.0, "fourfold": 4.0}

EXPERIMENT = Experiment(
    question="Which window and which learning rate make the best plain Flow-GRPO?",
    against="published",
    arms={
        "published": Arm(),
        **{f"{name}_{rate}": Arm(w, faster=f) for name, w in WINDOWS.items() for rate, f in RATES.items()},
        "updates_4": Arm(WINDOWS["steps_1_3"] | {"train.updates_per_epoch": 4}),
        "decay": Arm(WINDOWS["steps_1_3"] | {"train.half_life": 8.0}, faster=4.0, sizes=("shapes",)),
        "ema_off": Arm(WINDOWS["steps_1_3"] | {"train.ema.decay": 0.0}),
    },
)

get_config = EXPERIMENT.get_config
