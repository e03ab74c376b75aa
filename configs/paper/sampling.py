"""The search at sampling time: no training, what each size of it buys and costs.

For      the cheapest search that keeps most of the gain; it screens what is worth training with.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/sampling.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   graded .404 -> .669 by 5 x 5; 4 candidates forecast by 3 calls keep 92 % of it; docs/reproducing.md.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

SIZES = [(k, n) for n in (1, 2, 3, 5) for k in (3, 5, 8, 10, 25) if k * n <= 50 and (k != 8 or n == 1)]
FULL = {"search.rounds": 5, "search.candidates": 5}
PAIRS = {"search.antithetic": True}
BEST = {"search.rounds": 1, "search.returns": "best"}


def grid() -> dict[str, Arm]:
    """Rounds × candidates, the mean returned from several rounds and the best of one."""
    arms = {}
    for k, n in SIZES:
        returns = "best" if n == 1 else "mean"
        elite = 0.5 if k > 3 else 0.67
        size = {"search.rounds": n, "search.candidates": k, "search.returns": returns, "search.elite": elite}
        arms[f"early_{k}x{n}"] = Arm(ways.EARLY | ways.EVALUATED | size, longer=0)
    return arms


EXPERIMENT = Experiment(
    question="What does the search buy at sampling time, and what does it cost?",
    against="plain",
    seeds=1,
    common={"search.space": "transition"},
    arms={
        "plain": Arm({"sampler.eval_steps": 10}, longer=0),
        "plain_40_steps": Arm({"sampler.eval_steps": 40}, longer=0),
        "images_16": Arm({"sampler.eval_steps": 10, "eval.seeds": 16}, longer=0),
        **grid(),
        "early_5x5_best": Arm(ways.EARLY | ways.EVALUATED | FULL | {"search.returns": "best"}, longer=0),
        "early_5x5_sample": Arm(ways.EARLY | ways.EVALUATED | FULL | {"search.returns": "sample"}, longer=0),
        "early_5x5_rms": Arm(ways.EARLY | ways.EVALUATED | FULL | ways.UNIT_NOISE, longer=0),
        **{
            f"{name}_{k}x1": Arm(
                ways.EVALUATED | BEST | {"search.steps": steps, "search.candidates": k}, longer=0
            )
            for name, steps in (("step_1", [1]), ("steps_1_2", [1, 2]))
            for k in (8, 25)
        },
        **{
            f"early_{k}x1_pairs": Arm(
                ways.EARLY | ways.EVALUATED | BEST | PAIRS | {"search.candidates": k}, longer=0
            )
            for k in (2, 4, 8)
        },
        **{
            f"early_{k}x1_look_{n}": Arm(
                ways.EARLY | ways.EVALUATED | BEST | {"search.candidates": k, "search.lookahead": n}, longer=0
            )
            for k, n in ((4, 3), (8, 2), (8, 4))
        },
        "early_2x1": Arm(ways.EARLY | ways.EVALUATED | BEST | {"search.candidates": 2}, longer=0),
        "early_4x1": Arm(ways.EARLY | ways.EVALUATED | BEST | {"search.candidates": 4}, longer=0),
        "late_5x5": Arm(ways.PUBLISHED | ways.EVALUATED, longer=0),
        "all_5x5": Arm(ways.PUBLISHED | ways.EVALUATED | {"search.steps": "all"}, longer=0),
        "random_5x5": Arm(
            ways.PUBLISHED | ways.EARLY | ways.EVALUATED | {"search.select": "random"}, longer=0
        ),
    },
)

get_config = EXPERIMENT.get_config
