"""Advantage-weighted matching: the flow-matching loss of a finished image as its log-probability.

    l = -w(t, mse),   mse = mean (v - (eps - x0))²,   then the clipped ratio exp(l - l_old) as in GRPO

It shares its data path with DiffusionNFT: fresh (t, eps) for each finished latent, no SDE.
docs/algorithm.md, section 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from smart_grpo_jax.maths import grpo
from smart_grpo_jax.maths.choice import choose

HUBER = 1e-5
GENERAL_HUBER_POWER, GENERAL_HUBER_OFFSET = 0.25, 1e-10


def _ghuber(mse: Array, t: Array) -> Array:
    """t (mse^p - c^p) / p: flatter than huber, for p = 1/4."""
    p = GENERAL_HUBER_POWER
    return t * (mse**p - GENERAL_HUBER_OFFSET**p) / p


WEIGHTS = {
    "uniform": lambda mse, t: mse,
    "t": lambda mse, t: t * mse,
    "t2": lambda mse, t: t**2 * mse,
    "huber": lambda mse, t: t * (jnp.sqrt(mse + HUBER**2) - HUBER),
    "ghuber": _ghuber,
}


def log_prob(
    v: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Float[Array, " b"],
    weighting: str = "ghuber",
) -> Float[Array, " b"]:
    """The surrogate l = -w(t, mse) of each sample."""
    mse = ((v - (eps - x0)) ** 2).mean(tuple(range(1, v.ndim)))
    return -choose(WEIGHTS, weighting, "awm weighting")(mse, t)


def loss(
    v: Float[Array, "b *d"],
    v_old: Float[Array, "b *d"],
    v_ref: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Float[Array, " b"],
    advantages: Float[Array, " b"],
    *,
    clip: ArrayLike = 1.0,
    weighting: str = "ghuber",
    kl_weight: float = 0.0,
    weight: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], grpo.Metrics]:
    """The clipped surrogate on l, plus kl_weight * mean (v - v_ref)²; `weight` masks samples."""
    new = log_prob(v, x0, eps, t, weighting)
    old = jax.lax.stop_gradient(log_prob(v_old, x0, eps, t, weighting))
    policy, metrics = grpo.ppo_loss(new, old, advantages, clip, weight)
    kl = grpo.masked_mean(((v - v_ref) ** 2).mean(tuple(range(1, v.ndim))), weight)
    return policy + kl_weight * kl, {**metrics, "kl": jax.lax.stop_gradient(kl)}
