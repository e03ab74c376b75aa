"""Who gets the gain of the search: five ways from rewards to the advantage of each executed step.

When every member of a group is searched, the baseline of the group takes away what the search gave to
all of them, and the policy learns no more than without it. docs/algorithm.md, section 5.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from smart_grpo_jax.maths import grpo
from smart_grpo_jax.maths.choice import choose


class _Rollout(NamedTuple):
    """What all ways look at, and how advantages are normalised; T steps of b images."""

    rewards: Array
    group_ids: Array
    num_groups: int
    searched: Array  # [T, b]
    one_step_rewards: Array | None
    offset: ArrayLike
    scope: str
    clip: float
    ok: Array

    def advantages(self, rewards: Array, group_ids: Array, ok: Array) -> Array:
        return grpo.advantages(rewards, group_ids, self.num_groups, scope=self.scope, clip=self.clip, ok=ok)


def _none(rollout: _Rollout) -> Array:
    """The paper: the advantage of the finished image at every step."""
    a = rollout.advantages(rollout.rewards, rollout.group_ids, rollout.ok)
    return jnp.broadcast_to(a, rollout.searched.shape)


def _offset(rollout: _Rollout) -> Array:
    """A constant is added at searched transitions: the policy imitates the search. Failed images stay 0."""
    return _none(rollout) + rollout.offset * (rollout.searched & rollout.ok)


def _split(rollout: _Rollout) -> Array:
    """Searched transitions are judged against the unsearched part of the group; every other transition
    against its own part, so that being searched earns nothing for unrelated noise.

    The std is that of the rewards about the mean of their own part (per group where scope is "group").
    A group without an unsearched image has nothing to compare with: all against its own part.
    """
    ids, n, ok = rollout.group_ids, rollout.num_groups, rollout.ok
    rewards = jnp.where(ok, rollout.rewards, 0)
    member = rollout.searched.any(0)
    parts = 2 * ids + member
    own = grpo.centre(rewards, parts, 2 * n, ok)
    plain = ok & ~member
    has_plain = jax.ops.segment_max(plain.astype(jnp.int32), ids, n)[ids] > 0
    against_plain = jnp.where(ok & has_plain, rewards - grpo.group_mean(rewards, ids, n, plain), own)
    scope = "group" if rollout.scope == "group" else "within"
    std = grpo.SCOPES[scope](rewards, own, ids, n, ok)
    judged = jnp.where(rollout.searched, against_plain, own)
    return jnp.clip(judged / (std + grpo.EPS), -rollout.clip, rollout.clip)


def _difference(rollout: _Rollout) -> Array:
    """The one-step reward after the step minus before it, centred in the prompt group and divided by the
    std of that step: credit at no extra network call, without a finished image."""
    r = rollout.one_step_rewards
    if r is None:
        raise ValueError('credit "difference": got no one-step rewards, want them at every time [T + 1, b]')
    valid = jnp.isfinite(r)
    r = jnp.where(valid, r, 0)
    ok = rollout.ok & valid[1:] & valid[:-1]
    return jax.vmap(lambda gain, ok: rollout.advantages(gain, rollout.group_ids, ok))(r[1:] - r[:-1], ok)


def local(
    rewards: Float[Array, "n k"],
    *,
    scope: str = "within",
    clip: float = 5.0,
    ok: Bool[Array, "n k"] | None = None,
) -> Float[Array, "n k"]:
    """The k candidates of each searched state are one group, judged by their one-step rewards.

    The default scope leaves out what differs between states, which is mostly the prompt.
    """
    n, k = rewards.shape
    ok = jnp.isfinite(rewards) if ok is None else ok & jnp.isfinite(rewards)
    states = jnp.repeat(jnp.arange(n), k)
    return grpo.advantages(rewards.ravel(), states, n, scope=scope, clip=clip, ok=ok.ravel()).reshape(n, k)


PER_STEP = {"none": _none, "offset": _offset, "split": _split, "difference": _difference}
CREDITS = {**PER_STEP, "local": local}


def assign(
    kind: str,
    rewards: Float[Array, " b"],
    group_ids: Int[Array, " b"],
    num_groups: int,
    searched_steps: Bool[Array, " steps"],
    searched_members: Bool[Array, " b"],
    one_step_rewards: Float[Array, "steps_plus_1 b"] | None = None,
    offset: ArrayLike = 0.0,
    *,
    scope: str = "global",
    clip: float = 5.0,
    ok: Bool[Array, " b"] | None = None,
) -> Float[Array, "steps b"]:
    """The advantage of every executed step of every image: one of the `PER_STEP` ways.

    A transition counts as searched where both its step and its image are; "local" has groups of its own.
    """
    ok = jnp.ones(rewards.shape, bool) if ok is None else ok
    searched = jnp.asarray(searched_steps)[:, None] & jnp.asarray(searched_members)
    way = choose(PER_STEP, kind, "credit of executed steps")
    return way(_Rollout(rewards, group_ids, num_groups, searched, one_step_rewards, offset, scope, clip, ok))
