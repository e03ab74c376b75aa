"""Losses without a likelihood: NFT and AWM with KL and averages for stability.

For      whether they learn faster than windowed Flow-GRPO, and what keeps a long run from collapsing.
Hardware shapes: 2 CPU cores, under 3 GB. sd35: the weights and state of configs/sd35_medium.py.
Command  python -m smart_grpo_jax.main --mode=experiment --config=configs/paper/likelihood_free.py
         in the other size: FILE:sd35; one line of it, trained alone: FILE:ARM or FILE:ARM,sd35
Expect   NFT needs no help at this length, a longer average adds a little; AWM falls, a small beta falls back.
"""

from smart_grpo_jax.core import ways
from smart_grpo_jax.core.experiments import Arm, Experiment

KL = {"train.kl": "velocity", "train.kl_weight": 1e-4}
SLOW = {"train.ema.decay": 0.95}

EXPERIMENT = Experiment(
    question="Which likelihood-free loss is fast and stays stable?",
    against="windowed",
    epochs={"shapes": 48},
    by_size={"shapes": ways.SMALL},
    arms={
        "windowed": Arm(ways.WINDOWED, faster=2.0),
        "nft": Arm(ways.NFT | ways.PLAIN_ODE),
        "nft_noise": Arm(ways.NFT | ways.window(1, 2)),
        "nft_kl": Arm(ways.NFT | ways.PLAIN_ODE | KL),
        "nft_slow_average": Arm(ways.NFT | ways.PLAIN_ODE | SLOW),
        "nft_slow_actor": Arm(ways.NFT | ways.PLAIN_ODE | SLOW | {"train.actor": "ema"}),
        "nft_small_beta": Arm(ways.NFT | ways.PLAIN_ODE | {"train.nft_beta": 0.3}),
        "nft_slow": Arm(ways.NFT | ways.PLAIN_ODE, faster=0.5),
        "nft_fast": Arm(ways.NFT | ways.PLAIN_ODE, faster=2.0),
        "nft_decay": Arm(
            ways.NFT | ways.PLAIN_ODE | {"train.half_life": 16.0}, faster=2.0, sizes=("shapes",)
        ),
        "nft_8": Arm(ways.NFT | ways.PLAIN_ODE | {"train.inner_epochs": 8}),
        "awm": Arm(ways.AWM | ways.PLAIN_ODE),
        "awm_kl": Arm(ways.AWM | ways.PLAIN_ODE | KL),
    },
)

get_config = EXPERIMENT.get_config
