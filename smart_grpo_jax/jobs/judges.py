"""The three mixtures of a run: what trains, what the search asks, and what evaluations look at.

Equal entries are built once, and lie on the mesh once, in however many mixtures they stand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from smart_grpo_jax.core.config import Config, Host
from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards import base, host, mixture
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.mesh import at_rest


class Judges(NamedTuple):
    """`evaluation` has the value of `training` and more parts beside it."""

    training: base.Reward
    search: base.Reward
    evaluation: base.Reward

    @property
    def params(self) -> dict[str, PyTree]:
        """What a rollout takes; the search's own only where it has any."""
        own = {} if self.search is self.training else {"search_reward": self.search.params}
        return {"reward": self.training.params, **own}


def greet(config: Config) -> None:
    """UserError for a server that is not there, before any weights are read."""
    for table in (config.rewards, config.eval_rewards):
        mixture.greet(table, config.host)


Put = Callable[[PyTree, PyTree], PyTree]
"""put(parameters, shardings): onto the devices, or only on paper."""


def assemble(
    config: Config, mesh: Mesh, build: mixture.Make = mixture.built, put: Put = distributed.place
) -> Judges:
    """All rewards of a config, their parameters at rest on the mesh."""
    known: dict[str, base.Reward] = {}

    def make(name: str, entry: Any, limits: Host | None) -> base.Reward:
        options = mixture.options_of(entry)
        mark = repr((options.pop("kind", name), sorted(options.items(), key=repr)))
        if mark not in known:
            made = build(name, entry, limits)
            known[mark] = dataclasses.replace(made, params=put(made.params, at_rest(mesh, made.params)))
        return known[mark]

    training = mixture.mixture(config.rewards, config.host, make)
    search = mixture.mixture(config.search_reward, config.host, make) if config.search_reward else training
    return Judges(training, search, joined(config, training, make))


def joined(config: Config, reward: base.Reward, make: mixture.Make) -> base.Reward:
    """The training reward with more parts beside it: evaluation's view. Its value stays the training one."""
    # only the parts are looked at, and those are before the weights; a server is not asked twice
    asked = mixture.outside(config.rewards)
    extra = {k: mixture.options_of(v) for k, v in config.eval_rewards.items() if k not in asked}
    if not extra:
        return reward
    held = mixture.mixture({k: {**options, "weight": 1.0} for k, options in extra.items()}, config.host, make)

    def score(params: PyTree, images: Any, ctx: PyTree, t: Any = None) -> Scores:
        value = reward.score(params[0], images, ctx[0], t)
        more = held.score(params[1], images, ctx[1], t)
        return Scores(value.value, value.ok, {**more.parts, **value.parts})

    return base.Reward(
        name="evaluation",
        params=(reward.params, held.params),
        prepare=lambda texts: (reward.prepare(texts), held.prepare(texts)),
        score=score,
        uses_prompt=True,
        host=host.beside(reward.host, held.host),
    )
