"""From rewards to a gradient: group advantages, the clipped surrogate, and GRPO-Guard's version of it.

One advantage rule serves every kind of group: the images of a prompt, the branches of a state, the
candidates of one searched step. docs/algorithm.md, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from smart_grpo_jax.maths.choice import choose

Metrics = dict[str, Array]

EPS = 1e-4


def centre(
    rewards: Float[Array, " b"], group_ids: Int[Array, " b"], num_groups: int, ok: Bool[Array, " b"]
) -> Float[Array, " b"]:
    """r - mean of its group, 0 where not ok.

    Taken relative to the smallest reward of the group, so that a constant group gives 0 and not 1e-8.
    """
    low = jax.ops.segment_min(jnp.where(ok, rewards, jnp.inf), group_ids, num_groups)
    above = jnp.where(ok, rewards - low[group_ids], 0)
    return jnp.where(ok, above - group_mean(above, group_ids, num_groups, ok), 0)


def group_mean(
    values: Float[Array, " b"], group_ids: Int[Array, " b"], num_groups: int, ok: Bool[Array, " b"]
) -> Float[Array, " b"]:
    """The mean over the ok members of each one's group, at every member: [b] -> [b]."""
    total = jax.ops.segment_sum(jnp.where(ok, values, 0), group_ids, num_groups)
    count = jax.ops.segment_sum(ok.astype(values.dtype), group_ids, num_groups)
    return (total / jnp.maximum(count, 1))[group_ids]


def _std_global(rewards, centred, group_ids, num_groups, ok):
    """Of all rewards of the epoch, whatever their prompt: flow_grpo's global_std."""
    del centred
    everyone = jnp.zeros_like(group_ids)
    return jnp.sqrt(group_mean(centre(rewards, everyone, 1, ok) ** 2, everyone, 1, ok))


def _std_group(rewards, centred, group_ids, num_groups, ok):
    """Of each group."""
    del rewards
    return jnp.sqrt(group_mean(centred**2, group_ids, num_groups, ok))


def _std_within(rewards, centred, group_ids, num_groups, ok):
    """Of all rewards about the mean of their own group: what differs between groups does not count."""
    del rewards
    everyone = jnp.zeros_like(group_ids)
    return jnp.sqrt(group_mean(centred**2, everyone, 1, ok))


SCOPES = {"global": _std_global, "group": _std_group, "within": _std_within}


def advantages(
    rewards: Float[Array, " b"],
    group_ids: Int[Array, " b"],
    num_groups: int,
    *,
    scope: str = "global",
    eps: float = EPS,
    clip: float = 5.0,
    ok: Bool[Array, " b"] | None = None,
) -> Float[Array, " b"]:
    """A_i = (r_i - mean of the group) / (std + eps), clipped to ±clip.

    `scope` says over what the std (ddof 0) is taken: "global", "group", or "within" (all rewards about
    their group means). A failed reward (ok = False) has advantage 0 and enters no statistic.
    """
    ok = jnp.ones(rewards.shape, bool) if ok is None else ok
    rewards = jnp.where(ok, rewards, 0)
    centred = centre(rewards, group_ids, num_groups, ok)
    std = choose(SCOPES, scope, "advantage scope")(rewards, centred, group_ids, num_groups, ok)
    return jnp.clip(centred / (std + eps), -clip, clip)


def advantages_per_reward(
    parts: Mapping[str, Float[Array, " b"]],
    weights: Mapping[str, float],
    group_ids: Int[Array, " b"],
    num_groups: int,
    *,
    scope: str = "global",
    eps: float = EPS,
    clip: float = 5.0,
    ok: Bool[Array, " b"] | None = None,
) -> Float[Array, " b"]:
    """Each reward normalised on its own, then summed with its weight: no reward wins by its scale."""
    if set(parts) != set(weights):
        raise ValueError(f"rewards: got weights for {sorted(weights)}, want them for {sorted(parts)}")
    total = sum(
        weights[name] * advantages(part, group_ids, num_groups, scope=scope, eps=eps, clip=jnp.inf, ok=ok)
        for name, part in parts.items()
    )
    return jnp.clip(total, -clip, clip)


def zero_std_ratio(
    rewards: Float[Array, " b"],
    group_ids: Int[Array, " b"],
    num_groups: int,
    ok: Bool[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """The share of groups whose rewards are all equal, from which nothing is learned."""
    ok = jnp.ones(rewards.shape, bool) if ok is None else ok
    low = jax.ops.segment_min(jnp.where(ok, rewards, jnp.inf), group_ids, num_groups)
    high = jax.ops.segment_max(jnp.where(ok, rewards, -jnp.inf), group_ids, num_groups)
    present = high >= low
    return jnp.sum(present & (high == low)) / jnp.maximum(present.sum(), 1)


def masked_mean(values: Float[Array, "*m"], weight: Float[Array, "*m"] | None = None) -> Float[Array, ""]:
    """sum(weight * values) / number of elements with a positive weight; 0 where there are none.

    A 0/1 weight makes it the mean over the kept; a step weight keeps its scale.
    """
    if weight is None:
        return values.mean()
    kept = weight > 0
    return jnp.sum(jnp.where(kept, weight * values, 0)) / jnp.maximum(kept.sum(), 1)


def ppo_loss(
    log_prob: Float[Array, "*m"],
    old_log_prob: Float[Array, "*m"],
    advantages: Float[Array, "*m"],
    clip: ArrayLike,
    weight: Float[Array, "*m"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(log p - log p_old)."""
    log_ratio = _kept(log_prob - old_log_prob, weight)
    return _clipped_surrogate(log_ratio, log_ratio, advantages, clip, weight)


def guard_log_ratio(
    log_prob: Float[Array, "m *k"],
    old_log_prob: Float[Array, "m *k"],
    mean: Float[Array, "m *d"],
    old_mean: Float[Array, "m *d"],
    std: ArrayLike,
) -> Float[Array, "m *k"]:
    """RatioNorm: (log p - log p_old + b) s with b = mean_d (m - m_old)² / 2s².

    It equals mean_d(noise * (m - m_old)): without drift in its mean, and on one scale at every step.
    `std` is a number, [m] or [m, 1, ...].
    """
    std = jnp.asarray(std, mean.dtype)
    std = jnp.broadcast_to(std.reshape(-1, *(1,) * (mean.ndim - 1)) if std.ndim == 1 else std, mean.shape)
    dims = tuple(range(1, mean.ndim))
    noisy = std > 0
    bias = jnp.where(noisy, 0.5 * ((mean - old_mean) / jnp.where(noisy, std, 1)) ** 2, 0).mean(dims)
    per_state = (-1,) + (1,) * (log_prob.ndim - 1)
    return (log_prob - old_log_prob + bias.reshape(per_state)) * std.mean(dims).reshape(per_state)


def guard_loss(
    log_prob: Float[Array, "m *k"],
    old_log_prob: Float[Array, "m *k"],
    mean: Float[Array, "m *d"],
    old_mean: Float[Array, "m *d"],
    std: ArrayLike,
    advantages: Float[Array, "m *k"],
    clip: ArrayLike,
    weight: Float[Array, "m *k"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The clipped surrogate on GRPO-Guard's ratio; clip ranges are near 2e-6, not 1e-4."""
    log_ratio = _kept(guard_log_ratio(log_prob, old_log_prob, mean, old_mean, std), weight)
    return _clipped_surrogate(log_ratio, _kept(log_prob - old_log_prob, weight), advantages, clip, weight)


def _kept(log_ratio: Array, weight: Array | None) -> Array:
    """0 where masked, so that a step without a density cannot put a NaN into a sum."""
    return log_ratio if weight is None else jnp.where(weight > 0, log_ratio, 0)


def _clipped_surrogate(log_ratio, log_change, advantages, clip, weight) -> tuple[Array, Metrics]:
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    kept = None if weight is None else (weight > 0).astype(ratio.dtype)
    metrics = {
        "approx_kl": 0.5 * masked_mean(log_change**2, kept),
        "clip_fraction": masked_mean((jnp.abs(ratio - 1) > clip).astype(ratio.dtype), kept),
        "clip_fraction_high": masked_mean((ratio - 1 > clip).astype(ratio.dtype), kept),
        "clip_fraction_low": masked_mean((1 - ratio > clip).astype(ratio.dtype), kept),
        "ratio_max_error": jnp.max(jnp.abs(ratio - 1)),
    }
    loss = masked_mean(jnp.maximum(-advantages * ratio, -advantages * clipped), weight)
    return loss, jax.lax.stop_gradient(metrics)
