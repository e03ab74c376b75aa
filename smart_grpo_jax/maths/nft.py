"""DiffusionNFT: learn from finished images by regression, without an SDE and without a likelihood.

    x_t = (1 - t) x0 + t eps,   r = clip(A / 2c + ½, 0, 1)
    v+ = beta v + (1 - beta) v_old,   v- = (1 + beta) v_old - beta v
    loss = c [r d(v+) + (1 - r) d(v-)] / beta,   d(v) = mean (x_t - t v - x0)² / sg(mean |x_t - t v - x0|)

Good images (r near 1) pull v towards them, bad ones push it away, by as much as they pull its mirror
image in v_old. docs/algorithm.md, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.maths.grpo import Metrics, masked_mean

SMALLEST_ERROR = 1e-5


class Terms(NamedTuple):
    """The loss of each sample, taken apart; `policy` = (r positive + (1 - r) negative) / beta."""

    r: Float[Array, " b"]
    positive: Float[Array, " b"]
    negative: Float[Array, " b"]
    policy: Float[Array, " b"]


def optimality(advantages: Float[Array, "*b"], adv_clip: float = 5.0) -> Float[Array, "*b"]:
    """r = clip(A / 2c + ½, 0, 1): the chance that the image is a good one."""
    return jnp.clip(advantages / (2 * adv_clip) + 0.5, 0, 1)


def terms(
    v: Float[Array, "b *d"],
    v_old: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Float[Array, " b"],
    advantages: Float[Array, " b"],
    *,
    beta: float = 1.0,
    adv_clip: float = 5.0,
) -> Terms:
    """The parts of the loss, for the velocity v that is trained and v_old of the rollout, both at x_t."""
    tb = t.reshape(-1, *(1,) * (x0.ndim - 1))
    x_t = (1 - tb) * x0 + tb * eps
    v_old = jax.lax.stop_gradient(v_old)

    def distance(velocity: Array) -> Array:
        dims = tuple(range(1, x0.ndim))
        error = x_t - tb * velocity - x0
        scale = jnp.maximum(jnp.abs(error).mean(dims), SMALLEST_ERROR)
        return (error**2).mean(dims) / jax.lax.stop_gradient(scale)

    r = optimality(advantages, adv_clip)
    positive = distance(beta * v + (1 - beta) * v_old)
    negative = distance((1 + beta) * v_old - beta * v)
    return Terms(r, positive, negative, (r * positive + (1 - r) * negative) / beta)


def loss(
    v: Float[Array, "b *d"],
    v_old: Float[Array, "b *d"],
    v_ref: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Float[Array, " b"],
    advantages: Float[Array, " b"],
    *,
    beta: float = 1.0,
    adv_clip: float = 5.0,
    kl_weight: float = 0.0,
    weight: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss above, times adv_clip, plus kl_weight * mean (v - v_ref)²; `weight` masks samples."""
    parts = terms(v, v_old, x0, eps, t, advantages, beta=beta, adv_clip=adv_clip)
    kl = masked_mean(((v - v_ref) ** 2).mean(tuple(range(1, v.ndim))), weight)
    policy = adv_clip * masked_mean(parts.policy, weight)
    metrics = {"policy_loss": policy, "kl": kl, "optimality": masked_mean(parts.r, weight)}
    return policy + kl_weight * kl, jax.lax.stop_gradient(metrics)
