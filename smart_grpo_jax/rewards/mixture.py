"""Several rewards as one: a weighted sum that still tells its summands apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.schema import weight_of
from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards import base, host


def options_of(entry: Any) -> dict[str, Any]:
    """What an entry says beside its weight: path, dtype and the reward's own options."""
    if not (isinstance(entry, Mapping) or hasattr(entry, "items")):
        return {}
    return {key: value for key, value in entry.items() if key != "weight"}


def outside(spec: Mapping[str, Any]) -> list[str]:
    """The entries of a mixture that are not asked in the graph."""
    return [name for name, entry in spec.items() if base.is_host(options_of(entry).get("kind") or name)]


def greet(spec: Mapping[str, Any], limits: Host) -> None:
    """UserError where a server of the mixture is not there."""
    for name in outside(spec):
        built(name, spec[name], limits)


def built(name: str, entry: Any, limits: Host | None) -> base.Reward:
    """The reward of one entry; what is wrong with it is said under the entry's own name, too."""
    try:
        return base.build(name, limits=limits, **options_of(entry))
    except UserError as error:
        if options_of(entry).get("kind", name) == name:
            raise
        raise UserError(f"{name}: {error}") from error


Make: TypeAlias = Callable[[str, Any, Host | None], base.Reward]
"""The reward of an entry: `built`, or something that builds equal entries once."""


def mixture(spec: Mapping[str, Any], limits: Host | None = None, make: Make = built) -> base.Reward:
    """One reward from `{name: weight}` or `{name: {weight: w, **options}}`.

    value = Σ weight · value_i where every weighted summand is ok; a summand that failed makes the whole
    missing, never 0. A weight of 0 only logs. Parts: `name` is each summand's value before its weight,
    `name/part` its own parts. What is not in the graph adds its share of the sum through `host`.
    """
    weights = {name: weight_of(entry) for name, entry in spec.items()}
    if not any(weights.values()):
        raise UserError(
            f"rewards: got {dict(weights)}, want at least one reward with a weight (try shapes=1.0)"
        )
    every = {name: make(name, entry, limits) for name, entry in spec.items()}
    hosts = {name: reward.host for name, reward in every.items() if reward.host is not None}
    rewards = {name: reward for name, reward in every.items() if name not in hosts}

    def prepare(prompts: Sequence[str]) -> dict[str, PyTree]:
        return {name: reward.prepare(prompts) for name, reward in every.items()}

    def score(params: PyTree, images: Float[Array, "b H W 3"], ctx: PyTree, t: Array | None = None) -> Scores:
        value = jnp.zeros(images.shape[0], jnp.float32)
        ok = jnp.ones(images.shape[0], bool)
        parts: dict[str, Array] = {}
        for name, reward in rewards.items():
            scores = reward.score(params[name], images, ctx[name], t)
            good = scores.ok & jnp.isfinite(scores.value)
            parts[name] = jnp.where(good, scores.value, jnp.nan)
            parts.update({f"{name}/{part}": array for part, array in scores.parts.items()})
            if weights[name]:
                value = value + weights[name] * jnp.where(good, scores.value, 0.0)
                ok = ok & good
        return Scores(jnp.where(ok, value, jnp.nan), ok, parts)

    return base.Reward(
        name="+".join(every),
        params={name: reward.params for name, reward in every.items()},
        prepare=prepare,
        score=score,
        uses_prompt=any(reward.uses_prompt for reward in every.values()),
        host=host.weighted(hosts, weights),
    )


def summed(scores: Scores, weights: Mapping[str, float]) -> Float[Array, " k"]:
    """The mixture's own value: the reward of the widest spread decides most."""
    return scores.value


def zscored(scores: Scores, weights: Mapping[str, float]) -> Float[Array, " k"]:
    """Σ weight · (value - mean) / std over the candidates; a reward that cannot tell them apart is silent."""

    def standard(value: Array, ok: Array) -> Array:
        count = jnp.maximum(ok.sum(), 1)
        away = jnp.where(ok, value - jnp.where(ok, value, 0).sum() / count, 0.0)
        std = jnp.sqrt((away**2).sum() / count)
        return away / jnp.where(std > 0, std, 1.0)

    return _each(standard, scores, weights)


def ranked(scores: Scores, weights: Mapping[str, float]) -> Float[Array, " k"]:
    """Σ weight · rank among the candidates, ties sharing the middle of their ranks."""

    def rank(value: Array, ok: Array) -> Array:
        below = (value[:, None] > value[None]) & ok[None]
        equal = (value[:, None] == value[None]) & ok[None]
        return below.sum(1) + (equal.sum(1) - 1) / 2

    return _each(rank, scores, weights)


def _each(
    scale: Callable[[Array, Array], Array], scores: Scores, weights: Mapping[str, float]
) -> Float[Array, " k"]:
    """The weighted sum of the parts, each brought to the scale of its k candidates."""
    ok: Bool[Array, " k"] = scores.ok
    total = jnp.zeros(ok.shape, jnp.float32)
    for name, weight in weights.items():
        if weight:
            total = total + weight * scale(jnp.where(ok, scores.parts[name], 0.0), ok)
    return total


COMBINES: dict[str, Callable[[Scores, Mapping[str, float]], Array]] = {
    "sum": summed,
    "zscore": zscored,
    "rank": ranked,
}
"""`search.combine`: what the cross-entropy search orders its candidates by. It uses the order alone."""


def prefer(spec: Mapping[str, Any], kind: str) -> Callable[[Scores], Float[Array, " k"]]:
    """The order of the candidates of one state under a mixture."""
    weights = {name: weight_of(entry) for name, entry in spec.items()}
    return lambda scores: COMBINES[kind](scores, weights)
