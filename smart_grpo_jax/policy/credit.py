"""From a scored rollout to what the update learns from: advantages, masks, and the moves they belong to."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smart_grpo_jax.core.types import Endpoints, Transitions
from smart_grpo_jax.maths import credit, grpo
from smart_grpo_jax.policy.rollout import Acted, Shape

NOTHING = 1e-6
"""Advantages this small come from groups without a difference; such samples are left out of the mean."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static part: who is credited, and how rewards become advantages."""

    kind: str = "none"
    scope: str = "global"
    clip: float = 5.0
    combine: str = "sum"
    weights: tuple[tuple[str, float], ...] = ()
    likelihood: bool = True


class Masks(NamedTuple):
    """The traced part: trained and searched steps, the offset, and which groups are padding."""

    trained: Int[Array, " w"]
    searched: Bool[Array, " steps"]
    offset: Float[Array, ""]
    real: Bool[Array, " p"]


def experience(rule: Rule, shape: Shape, acted: Acted, masks: Masks) -> Transitions | Endpoints:
    """Samples [b, ...] for the update; for the likelihood losses each sample brings its trained steps."""
    groups = masks.real.shape[0]
    row = jnp.repeat(jnp.arange(groups), shape.members)
    ok = acted.ok & masks.real[row]
    if rule.kind == "local":
        return _candidates(rule, shape, acted, masks, ok)
    per_step = _advantages(rule, shape, acted, masks, row, ok)
    if not rule.likelihood:
        advantage = per_step[0]
        return Endpoints(acted.x0, advantage, _weight(advantage, ok), row)
    steps = lambda a: jnp.swapaxes(a[masks.trained], 0, 1)
    advantage = steps(per_step)
    return Transitions(
        steps(acted.x),
        steps(acted.x_next)[:, :, None],
        jnp.broadcast_to(masks.trained, advantage.shape),
        steps(acted.log_prob)[..., None],
        steps(acted.mean),
        advantage[..., None],
        _weight(advantage, ok[:, None])[..., None],
        jnp.broadcast_to(row[:, None], advantage.shape),
    )


def _weight(advantage: Array, ok: Array) -> Array:
    """1 where there is something to learn: a sample whose advantage is 0 is dropped, as in Flow-GRPO."""
    return (ok & (jnp.abs(advantage) > NOTHING)).astype(jnp.float32)


def _advantages(
    rule: Rule, shape: Shape, acted: Acted, masks: Masks, row: Array, ok: Array
) -> Float[Array, "steps b"]:
    groups = masks.real.shape[0]
    searched_members = jnp.tile(jnp.arange(shape.members) < shape.searched_members, groups)
    searched = masks.searched[: shape.stop]
    if rule.combine == "normalise":
        weights = dict(rule.weights)
        parts = {name: acted.parts[name] for name in weights}
        one = grpo.advantages_per_reward(parts, weights, row, groups, scope=rule.scope, clip=rule.clip, ok=ok)
        return jnp.broadcast_to(one, (shape.stop, one.shape[0]))
    reward = jnp.where(ok, acted.reward, 0.0)
    return credit.assign(
        rule.kind, reward, row, groups, searched, searched_members, acted.one_step, masks.offset,
        scope=rule.scope, clip=rule.clip, ok=ok,
    )  # fmt: skip


def _candidates(rule: Rule, shape: Shape, acted: Acted, masks: Masks, ok: Array) -> Transitions:
    """Local credit: the candidates of a searched state are one group. A failed finished image does not
    matter here, a failed candidate is left out."""
    found = acted.found
    assert found is not None and found.x_next is not None and found.log_prob is not None
    rewards = found.rewards[masks.trained].reshape(len(masks.trained), ok.shape[0], -1)
    flat = rewards.reshape(-1, rewards.shape[-1])
    real = jnp.repeat(masks.real, shape.members)
    valid = jnp.isfinite(flat) & jnp.tile(real, len(masks.trained))[:, None]
    scope = "within" if rule.scope == "global" else rule.scope
    advantage = credit.local(flat, scope=scope, clip=rule.clip, ok=valid)
    weight = _weight(advantage, valid)
    steps = lambda a: jnp.swapaxes(a, 0, 1)
    row = jnp.repeat(jnp.arange(masks.real.shape[0]), shape.members)
    index = jnp.broadcast_to(masks.trained, (ok.shape[0], len(masks.trained)))
    return Transitions(
        steps(acted.x[masks.trained]),
        steps(found.x_next[masks.trained]),
        index,
        steps(found.log_prob[masks.trained]),
        steps(acted.mean[masks.trained]),
        steps(advantage.reshape(rewards.shape)),
        steps(weight.reshape(rewards.shape)),
        jnp.broadcast_to(row[:, None], index.shape),
    )


def _known_mean(values: Float[Array, " b"], ok: Bool[Array, " b"]) -> Float[Array, ""]:
    """The mean of the part where it is known: one of weight 0 may be missing where the reward is not."""
    known = ok & jnp.isfinite(values)
    total = jnp.sum(jnp.where(known, values, 0.0))
    return jnp.where(known.any(), total / jnp.maximum(known.sum(), 1), jnp.nan)


def summary(rule: Rule, shape: Shape, acted: Acted, masks: Masks) -> dict[str, Array]:
    """What a log line tells of a rollout."""
    groups = masks.real.shape[0]
    row = jnp.repeat(jnp.arange(groups), shape.members)
    ok = acted.ok & masks.real[row]
    kept = ok.astype(jnp.float32)
    mean = lambda a: jnp.sum(jnp.where(ok, a, 0.0)) / jnp.maximum(kept.sum(), 1)
    reward = jnp.where(ok, acted.reward, 0.0)
    spread = jnp.sqrt(mean(grpo.centre(reward, row, groups, ok) ** 2))
    out = {
        "train/reward": mean(acted.reward),
        "train/group_std": spread,
        "train/zero_std_groups": grpo.zero_std_ratio(reward, row, groups, ok),
        "train/failed": 1 - kept.sum() / jnp.maximum(masks.real[row].sum(), 1),
    }
    out |= {f"train/{name}": _known_mean(value, ok) for name, value in acted.parts.items()}
    if acted.found is not None:
        valid = jnp.isfinite(acted.found.rewards)
        rewards = jnp.where(valid, acted.found.rewards, 0.0)
        member = jnp.repeat(masks.real, shape.searched_members).astype(jnp.float32)
        per_round = (rewards.sum(-1) / jnp.maximum(valid.sum(-1), 1) * member[:, None]).sum(1)
        per_round = per_round / jnp.maximum(member.sum(), 1)
        best = (jnp.where(valid, rewards, -jnp.inf).max((-1, -2)) * member).sum(-1) / jnp.maximum(
            member.sum(), 1
        )
        searched = masks.searched[: shape.stop]
        for j in range(shape.stop):
            out[f"search/step_{j}/first"] = jnp.where(searched[j], per_round[j, 0], jnp.nan)
            out[f"search/step_{j}/last"] = jnp.where(searched[j], per_round[j, -1], jnp.nan)
            out[f"search/step_{j}/best"] = jnp.where(searched[j], best[j], jnp.nan)
            out[f"search/step_{j}/rms"] = jnp.where(searched[j], acted.found.rms[j].mean(), jnp.nan)
    return out
