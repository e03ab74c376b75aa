"""Candidates as credit: the candidates of a state as a group of their own.

For      the search inside GRPO that needs no finished image: how many candidates, where, how well judged.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/credit.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   candidates of steps 3 and 4 lead: eight, or four seen by two calls, .02 above the baseline.

`local_K_steps_A_B` has as many members as make its epochs as dear as the baseline's.
"""

from typing import Any

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

STEPS_3_4, STEPS_2_4 = [3, 4], [2, 3, 4]


def local(candidates: int, steps: list[int], members: int, rate: float = 2.0, **search: Any) -> Arm:
    """Groups of the candidates of each state, at the baseline's rate."""
    more = {f"search.{name}": value for name, value in search.items()} | {"prompts.members": members}
    return Arm(ways.local(candidates, steps) | more, faster=rate)


def halving(arm: Arm) -> Arm:
    """With a rate that begins half as high again and halves every ten epochs."""
    return Arm({**arm.changes, "train.half_life": 10.0}, faster=1.5 * arm.faster, sizes=("shapes",))


WINDOWED = Arm(ways.WINDOWED, faster=2.0)

EXPERIMENT = Experiment(
    question="Which candidates make the best groups of their own?",
    against="windowed",
    arms={
        "windowed": WINDOWED,
        "windowed_decay": halving(WINDOWED),
        "local_4_steps_2_4": local(4, STEPS_2_4, 6),
        "local_4_steps_3_5": local(4, [3, 4, 5], 6),
        "local_4_steps_3_4": local(4, STEPS_3_4, 9),
        "local_4_steps_3_4_decay": halving(local(4, STEPS_3_4, 9)),
        "local_8_steps_2_4": local(8, STEPS_2_4, 3),
        "local_8_steps_3_4": local(8, STEPS_3_4, 5),
        "look_2_steps_3_4": local(4, STEPS_3_4, 7, lookahead=2),
        "look_3_steps_2_3": local(4, [2, 3], 6, lookahead=3),
        "look_6_steps_3_4": local(4, STEPS_3_4, 4, lookahead=6),
        "base_steps_3_4": local(4, STEPS_3_4, 9, forecast="base"),
    },
)

get_config = EXPERIMENT.get_config
