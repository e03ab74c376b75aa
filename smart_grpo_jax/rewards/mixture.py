"""Several rewards as one: a weighted sum that still tells its summands apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.schema import weight_of
from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards import base


def options_of(entry: Any) -> dict[str, Any]:
    """What an entry says beside its weight: path, dtype and the reward's own options."""
    if not (isinstance(entry, Mapping) or hasattr(entry, "items")):
        return {}
    return {key: value for key, value in entry.items() if key != "weight"}


def mixture(spec: Mapping[str, Any]) -> base.Reward:
    """One reward from `{name: weight}` or `{name: {weight: w, **options}}`.

    value = Σ weight · value_i where every weighted summand is ok; a summand that failed makes the whole
    missing, never 0. A weight of 0 only logs. Parts: `name` is each summand's value before its weight,
    `name/part` its own parts.
    """
    weights = {name: weight_of(entry) for name, entry in spec.items()}
    if not any(weights.values()):
        raise UserError(
            f"rewards: got {dict(weights)}, want at least one reward with a weight (try shapes=1.0)"
        )
    rewards = {name: base.build(name, **options_of(entry)) for name, entry in spec.items()}

    def prepare(prompts: Sequence[str]) -> dict[str, PyTree]:
        return {name: reward.prepare(prompts) for name, reward in rewards.items()}

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
        name="+".join(rewards),
        params={name: reward.params for name, reward in rewards.items()},
        prepare=prepare,
        score=score,
        uses_prompt=any(reward.uses_prompt for reward in rewards.values()),
        host=any(reward.host for reward in rewards.values()),
    )
