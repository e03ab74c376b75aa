"""Ways to train, as changes of the base in experiments.py: the vocabulary of configs/paper/.

Ways are added up by `|`: `PUBLISHED | EARLY` is the published search at the early steps.
"""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, Any] = {
    "search.rounds": 5,
    "search.candidates": 5,
    "search.elite": 0.5,
    "search.space": "latent",
    "search.returns": "mean",
    "search.steps": "late",
}
"""Algorithm 1 as published; the steps are not stated, these are where its Figure 3 finds the decode good."""

ONE_SHOT: dict[str, Any] = PUBLISHED | {"search.rounds": 1, "search.candidates": 25}
"""The mean of the best 12 of 25: its noise has a root mean square of 0.29 (docs/algorithm.md, section 5)."""

UNIT_NOISE: dict[str, Any] = {"search.noise_norm": "rms"}
"""The executed noise is scaled to unit length, so that two searches differ in direction alone."""

SMALL: dict[str, Any] = {"prompts.groups": 6, "eval.every": 12, "eval.seeds": 1}
"""Shapes only: small batches, in which a cost goes further (configs/paper/batches.py)."""

DEAR: dict[str, Any] = SMALL | {"train.inner_epochs": 2, "eval.every": 4}
"""Shapes only: for lines whose search costs many times their training. Two passes over what was searched."""

EARLY: dict[str, Any] = {"search.steps": "early"}
"""The steps with 0.65 ≤ t ≤ 0.95, which decide the layout."""


def trained_on(reward: str, *judges: str) -> dict[str, Any]:
    """One training reward; it and the judges are logged."""
    return {"rewards": {reward: 1.0}, "eval_rewards": {reward: 1.0, **dict.fromkeys(judges, 0.0)}}


def window(start: int, size: int) -> dict[str, Any]:
    """Noise and training at these steps alone; the rest of the path is the ODE."""
    return {
        "sampler.window.kind": "fixed",
        "sampler.window.start": start,
        "sampler.window.size": size,
    }


WINDOWED: dict[str, Any] = window(2, 3)
"""Three early steps: the Flow-GRPO that a search has to beat, tuned in configs/paper/windowed.py."""

WINDOWED_SEARCHED: dict[str, Any] = (
    PUBLISHED | WINDOWED | {"search.space": "transition", "search.steps": [2, 3, 4]}
)
"""The published search at the same steps, its candidates judged where they will lead."""


def best_of(candidates: int, steps: list[int] | str) -> dict[str, Any]:
    """One round at these steps, the best candidate executed: K times a step's cost and no refitting."""
    return {
        "search.rounds": 1,
        "search.candidates": candidates,
        "search.returns": "best",
        "search.steps": steps,
        "search.space": "transition",
    }


NFT: dict[str, Any] = {"train.loss": "nft", "train.updates_per_epoch": 1, "train.inner_epochs": 4}
"""The likelihood-free loss on finished images, four passes over each epoch's."""

AWM: dict[str, Any] = NFT | {"train.loss": "awm"}
"""Advantage-weighted matching on the same data."""

PLAIN_ODE: dict[str, Any] = {"sampler.transition": "ode", "sampler.window.kind": "all"}
"""No noise at all on the way: enough for the losses that need no density."""

HALF: dict[str, Any] = best_of(4, [1, 2]) | {"search.members": 0.5}
"""Half of each group executes the best of four at two early steps; all share one baseline."""


def local(candidates: int, steps: list[int]) -> dict[str, Any]:
    """A state's candidates are a group of their own; the rollout ends after the last of these steps."""
    return best_of(candidates, steps) | {
        "search.credit": "local",
        "search.execute": "random",
        "sampler.window.kind": "fixed",
        "sampler.window.start": min(steps),
        "sampler.window.size": max(steps) - min(steps) + 1,
    }


LOOK_3: dict[str, Any] = local(4, [3, 4]) | {"prompts.members": 2, "search.lookahead": 3}
"""Candidates as credit, forecast by three calls, for small batches: what won in configs/paper/verdict.py."""

EVALUATED: dict[str, Any] = {"eval.search": True, "sampler.eval_steps": 10}
"""The search at sampling time, on as many steps as in training."""
