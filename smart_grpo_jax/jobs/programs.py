"""The jitted programs of a run. Runs of one process that differ only in what reaches the programs as numbers
(a seed, a learning rate) share them: tracing takes longer than some of these runs.

The programs hold functions and no weights, so that keeping them keeps nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import schema
from smart_grpo_jax.jobs import evaluate, layout, record, speed
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.policy import credit, rollout
from smart_grpo_jax.runtime import distributed

AS_NUMBERS = ("seed", "train.", "log.", "checkpoint.", "sampler.window.", "sampler.noise_level")
"""Beginnings of fields that no program is made of, but for what the shape, the recipe and the rule hold."""

KEPT = 32
"""Runs whose programs are kept in a process; the oldest go first."""


class Programs(NamedTuple):
    """What a run calls on its devices, and what one image costs in each function."""

    act: Callable[..., Any]
    join: Callable[..., Any]
    credit: Callable[..., Any]
    summary: Callable[..., Any]
    learn: Callable[..., Any]
    evaluate: Callable[..., Any]
    prices: Callable[..., dict[str, float]]


def programs_of(run: Run) -> Programs:
    """The run's programs, those of an equal run before it where there was one."""
    key = same(run)
    if key not in _made:
        if len(_made) >= KEPT:
            del _made[next(iter(_made))]
        _made[key] = made(run)
    return _made[key]


def made(run: Run) -> Programs:
    """New programs; each is compiled when it is first called."""
    waits = distributed.waits
    return Programs(
        act=waits(jax.jit(partial(rollout.act, run.fns, run.shape))),
        join=waits(record.join),
        credit=waits(jax.jit(partial(credit.experience, run.rule, run.shape))),
        summary=waits(jax.jit(partial(credit.summary, run.rule, run.shape))),
        learn=waits(layout.learner(run.policy, run.recipe, run.mesh, run.where())),
        evaluate=evaluate.program(run, run.config.eval.search),
        prices=once(speed.prices),
    )


def same(run: Run) -> Hashable:
    """What two runs must agree in to share their programs."""
    flat = schema.flatten(configs.to_dict(run.config))
    fixed = {name: value for name, value in flat if not name.startswith(AS_NUMBERS)}
    return json.dumps(fixed, sort_keys=True), run.shape, run.recipe, run.rule, run.mesh


def once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, called the first time and remembered."""
    found: list[Any] = []

    def remembered(*args: Any) -> Any:
        if not found:
            found.append(fn(*args))
        return found[0]

    return remembered


_made: dict[Hashable, Programs] = {}
