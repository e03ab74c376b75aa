"""Figure 2b: elites by reward against elites at random.

For      whether random selection collapses, as the paper says, or is nearly plain noise, as theory says.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/figure2b.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   random elites train like plain noise, elites by reward .026 behind them; five seeds.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="What does random selection do to training?",
    against="random",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    seeds=5,
    arms={
        "flow_grpo": Arm(),
        "greedy": Arm(ways.PUBLISHED),
        "random": Arm(ways.PUBLISHED | {"search.select": "random"}),
    },
)

get_config = EXPERIMENT.get_config
