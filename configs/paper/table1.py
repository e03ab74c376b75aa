"""Table 1: the base, Flow-GRPO, Smart-GRPO, and larger models that are not trained.

For      whether the search lifts the policy's held-out reward, as published and per epoch.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/table1.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   no lift by the search (.417 against .432), harm where Flow-GRPO learns (.382 to .465); five seeds.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

LARGE = {
    "model.path": "stabilityai/stable-diffusion-3.5-large",
    "sampler.eval_steps": 28,
    "sampler.eval_guidance": 3.5,
}
FLUX = {
    "model.path": "black-forest-labs/FLUX.1-dev",
    "model.t5_length": 512,
    "sampler.eval_steps": 28,
    "sampler.guidance": 3.5,
    "sampler.eval_guidance": 3.5,
}

EXPERIMENT = Experiment(
    question="Does the published search lift the policy above Flow-GRPO?",
    against="flow_grpo",
    epochs={"shapes": 8},
    by_size={"shapes": ways.DEAR},
    seeds=5,
    arms={
        "base": Arm(longer=0),
        "guided_base": Arm({"sampler.eval_guidance": 2.0}, longer=0, sizes=("shapes",)),
        "sd35_large": Arm(LARGE, longer=0, sizes=("sd35",)),
        "flux": Arm(FLUX, longer=0, sizes=("sd35",)),
        "flow_grpo": Arm(),
        "smart_grpo": Arm(ways.PUBLISHED),
        "windowed": Arm(ways.WINDOWED, longer=2.0),
        "windowed_searched": Arm(ways.WINDOWED_SEARCHED, longer=2.0),
    },
)

get_config = EXPERIMENT.get_config
