"""What the update learns from: one function per loss, for one gradient call.

`_likelihood_loss` (PPO, GRPO-Guard) weighs stored steps by the density that the policy has there;
`_endpoint_loss` (NFT, AWM) re-noises finished latents and needs none. `LOSSES` names them. See
docs/algorithm.md, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.types import Conditioning, Endpoints, PyTree, Transitions, VelocityFn
from smart_grpo_jax.maths import awm, grpo, nft, transition


@dataclasses.dataclass(frozen=True)
class Policy:
    """How trainable weights become a policy: `bind(frozen, trainable)` gives the velocity's params,
    `reference(frozen)` those of the model before training."""

    velocity: VelocityFn
    raw_velocity: VelocityFn
    bind: Callable[[PyTree, PyTree], PyTree]
    reference: Callable[[PyTree], PyTree]
    constrain: Callable[[PyTree], PyTree] = lambda tree: tree
    ways: int = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of an update."""

    loss: str
    transition: str
    log_prob: str = "gaussian"
    kl: str = "flow_grpo"
    use_kl: bool = False
    updates: int = 2
    passes: int = 1
    chunk: int = 0
    adv_clip: float = 5.0
    actor: str = "raw"
    nft_beta: float = 1.0
    awm_weight: str = "ghuber"
    grad_clip: float = 1.0
    beta2: float = 0.999
    ema_every: int = 8


class Knobs(NamedTuple):
    """The traced part of an update."""

    seed: Int[Array, ""]
    epoch: Int[Array, ""]
    times: Float[Array, " steps+1"]
    noise_level: Float[Array, ""]
    step_weight: Float[Array, " steps"]
    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    warmup: Float[Array, ""]
    clip: Float[Array, ""]
    kl_weight: Float[Array, ""]
    ema_decay: Float[Array, ""]


class Draw(NamedTuple):
    """What the likelihood-free losses draw for each finished latent."""

    t: Float[Array, " m"] | None
    eps: Float[Array, "m h w c"] | None


GOLDEN = np.uint32(2654435769)
"""2³² over the golden ratio: its multiples, modulo 2³², leave no large gap however many they are."""

Experience = Transitions | Endpoints
LossFn = Callable[..., tuple[Array, dict[str, Array]]]


def draw(batch: Experience, key: Array) -> Draw:
    """Fresh times and noise per finished latent; stored steps carry their own. What a row draws follows from
    its place, not from the number of rows, for a mesh may have been filled up behind them: times are spread
    over (0.05, 1) by multiples of the golden ratio from a random start."""
    if isinstance(batch, Transitions):
        return Draw(None, None)
    rows = batch.x0.shape[0]
    key_t, key_eps = jax.random.split(key)
    turns = jax.random.bits(key_t, dtype=jnp.uint32) + jnp.arange(rows, dtype=jnp.uint32) * GOLDEN
    u = (turns >> 8).astype(jnp.float32) * 2.0**-24
    eps = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key_eps, row), batch.x0.shape[1:]))
    return Draw(0.05 + 0.95 * u, eps(jnp.arange(rows)))


def _likelihood_loss(
    policy: Policy,
    recipe: Recipe,
    params: PyTree,
    old: PyTree,
    frozen: PyTree,
    cond: Conditioning,
    batch: Transitions,
    draw: Draw,
    knobs: Knobs,
) -> tuple[Array, dict[str, Array]]:
    """PPO or GRPO-Guard on the density of stored steps: one forward per state, however many moves."""
    t, t_next = knobs.times[batch.step], knobs.times[batch.step + 1]
    rows = cond.rows(batch.row)
    v = policy.velocity(policy.bind(frozen, params), batch.x, t, rows)
    law = transition.step(recipe.transition, batch.x, v, t, t_next, knobs.noise_level, knobs.times[1])
    moves = batch.x_next.shape[1]
    std = jnp.broadcast_to(law.std, (len(t), 1, 1, 1))
    flat = batch.x_next.reshape(-1, *batch.x_next.shape[2:])
    each = lambda a: jnp.repeat(a, moves, axis=0)
    log_prob = transition.LOG_PROBS[recipe.log_prob](flat, each(law.mean), each(std)).reshape(-1, moves)
    weight = batch.weight * knobs.step_weight[batch.step][:, None]
    pair = (log_prob, batch.log_prob)
    if recipe.loss == "guard":
        loss, metrics = grpo.guard_loss(
            *pair, law.mean, batch.mean, std, batch.advantage, knobs.clip, weight=weight
        )
    else:
        loss, metrics = grpo.ppo_loss(*pair, batch.advantage, knobs.clip, weight=weight)
    ratio = jnp.where(batch.weight > 0, jnp.abs(jnp.exp(log_prob - batch.log_prob) - 1), 0.0)
    metrics = {"loss": loss, "ratio_error": ratio.max(), **_without_max(metrics)}
    if not recipe.use_kl:
        return loss, metrics
    v_ref = jax.lax.stop_gradient(policy.velocity(policy.reference(frozen), batch.x, t, rows))
    law_ref = transition.step(recipe.transition, batch.x, v_ref, t, t_next, knobs.noise_level, knobs.times[1])
    kl = transition.kl(recipe.kl, law.mean, law_ref.mean, std, t_next - t, v, v_ref)
    kl = grpo.masked_mean(kl, (batch.weight > 0).any(1).astype(kl.dtype))
    return loss + knobs.kl_weight * kl, metrics | {"kl": kl}


def _endpoint_loss(
    policy: Policy,
    recipe: Recipe,
    params: PyTree,
    old: PyTree,
    frozen: PyTree,
    cond: Conditioning,
    batch: Endpoints,
    draw: Draw,
    knobs: Knobs,
) -> tuple[Array, dict[str, Array]]:
    """NFT or AWM: the bare network (no guidance) on re-noised finished latents, no density."""
    t, eps = draw
    assert t is not None and eps is not None
    wide = t[:, None, None, None]
    x_t = (1 - wide) * batch.x0 + wide * eps
    rows = cond.rows(batch.row)

    def velocity(bound: PyTree) -> Array:
        return policy.raw_velocity(bound, x_t, t, rows)

    v = velocity(policy.bind(frozen, params))
    v_old = jax.lax.stop_gradient(velocity(policy.bind(frozen, old)))
    v_ref = jax.lax.stop_gradient(velocity(policy.reference(frozen))) if recipe.use_kl else v_old
    kl_weight = knobs.kl_weight if recipe.use_kl else 0.0
    given = (v, v_old, v_ref, batch.x0, eps, t, batch.advantage)
    shared = {"kl_weight": kl_weight, "weight": batch.weight}
    if recipe.loss == "nft":
        loss, metrics = nft.loss(*given, beta=recipe.nft_beta, adv_clip=recipe.adv_clip, **shared)
    else:
        loss, metrics = awm.loss(*given, clip=knobs.clip, weighting=recipe.awm_weight, **shared)
    if not recipe.use_kl:
        metrics = {k: v for k, v in metrics.items() if k != "kl"}
    return loss, {"loss": loss, **_without_max(metrics)}


def _without_max(metrics: dict[str, Array]) -> dict[str, Array]:
    return {k: v for k, v in metrics.items() if "max" not in k}


LOSSES: dict[str, LossFn] = {
    "ppo": _likelihood_loss,
    "guard": _likelihood_loss,
    "nft": _endpoint_loss,
    "awm": _endpoint_loss,
}
