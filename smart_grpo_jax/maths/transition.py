"""One step of the sampler from t to t' < t, its density, and what is derived from the two.

    x_t = (1 - t) x0 + t x1,   v = x1 - x0,   x0_hat = x - t v,   x1_hat = x + (1 - t) v,   dt = t' - t

A step is a Gaussian, x' = mean + std * noise. All arithmetic is float32 (or wider, as the input):
bfloat16 overflows in the mean. docs/algorithm.md, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import ArrayLike as Scalar  # a number, or one per batch row

from smart_grpo_jax.maths.choice import choose

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Transition(NamedTuple):
    """The law of x': `std` broadcasts against `mean`; 0 means that the step is deterministic."""

    mean: Float[Array, "*x"]
    std: Float[Array, "*s"]


def _ode(x, v, t, t_next, a, t_max):
    """Euler: mean = x + v dt."""
    del a, t_max
    return x + v * (t_next - t), jnp.zeros_like(t_next - t)


def _flow(x, v, t, t_next, a, t_max):
    """Flow-GRPO's SDE: mean = x + [v + sigma²/2t x1_hat] dt, std = sigma sqrt(-dt).

    sigma = a sqrt(t / (1 - t)), where the denominator at t = 1 is the second time's: the first std is
    exactly a.
    """
    dt = t_next - t
    room = 1 - jnp.where(t >= 1, t_max, t)
    rate = a**2 / room  # sigma² / t
    mean = x * (1 + 0.5 * rate * dt) + v * (1 + 0.5 * rate * (1 - t)) * dt
    return mean, a * jnp.sqrt(t / room) * jnp.sqrt(-dt)


def _dance(x, v, t, t_next, a, t_max):
    """DanceGRPO's SDE: the same with a constant sigma = a; no singularity at t = 1."""
    del t_max
    dt = t_next - t
    rate = a**2 / jnp.where(t > 0, t, 1)
    mean = x * (1 + 0.5 * rate * dt) + v * (1 + 0.5 * rate * (1 - t)) * dt
    return mean, a * jnp.sqrt(-dt)


def _cps(x, v, t, t_next, a, t_max):
    """Coefficients-preserving step: mean = (1 - t') x0_hat + sqrt(t'² - s²) x1_hat, s = t' sin(a pi/2).

    The noise of x' is exactly t', as the network believes; s = 0 on the last step. Wants 0 <= a <= 1.
    """
    del t_max
    x0, x1 = one_step(x, v, t), x + (1 - t) * v
    angle = a * (math.pi / 2)
    # |cos| is sqrt(t'² - s²) / t' without a square root whose gradient is infinite at t' = 0.
    return (1 - t_next) * x0 + t_next * jnp.abs(jnp.cos(angle)) * x1, t_next * jnp.sin(angle)


STEPS = {"ode": _ode, "flow": _flow, "dance": _dance, "cps": _cps}


def step(
    kind: str, x: Float[Array, "*x"], v: Float[Array, "*x"], t: Scalar, t_next: Scalar,
    noise_level: Scalar, t_max: Scalar,
) -> Transition:  # fmt: skip
    """The law of x' for a step of the given kind ("ode", "flow", "dance", "cps").

    `t`, `t_next`, `noise_level` are numbers or [b]; `t_max` is the schedule's second time. Where the
    std is 0 the mean is Euler's, to the bit, so that a window of noisy steps leaves the rest an ODE.
    """
    dtype = jnp.promote_types(jnp.result_type(x, v), jnp.float32)
    x, v = jnp.asarray(x, dtype), jnp.asarray(v, dtype)
    t, t_next, a, t_max = (_rows(jnp.asarray(s, dtype), x) for s in (t, t_next, noise_level, t_max))
    mean, std = choose(STEPS, kind, "transition")(x, v, t, t_next, a, t_max)
    euler, _ = _ode(x, v, t, t_next, a, t_max)
    return Transition(jnp.where(std == 0, euler, mean), std)


def stds(kind: str, times: Float[Array, " steps_plus_1"], noise_level: Scalar) -> Float[Array, " steps"]:
    """The std of every step of a schedule."""
    return _unit_steps(kind, times, noise_level).std


def leverage(kind: str, times: Float[Array, " steps_plus_1"], noise_level: Scalar) -> Float[Array, " steps"]:
    """|∂mean / ∂v| / std of every step: by how many of its own stds a step moves when the velocity moves by
    one. 0 where there is no noise."""
    law = _unit_steps(kind, times, noise_level)
    return jnp.where(law.std > 0, jnp.abs(law.mean) / jnp.where(law.std > 0, law.std, 1), 0)


def _unit_steps(kind: str, times: Float[Array, " steps_plus_1"], noise_level: Scalar) -> Transition:
    """Every step of a schedule from x = 0 under v = 1: its mean is the slope in v."""
    times = jnp.asarray(times)
    zero = jnp.zeros_like(times[:-1])
    law = step(kind, zero, zero + 1, times[:-1], times[1:], noise_level, times[1])
    return Transition(law.mean, jnp.broadcast_to(law.std, zero.shape))


def sample(transition: Transition, noise: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """x' = mean + std * noise."""
    return transition.mean + transition.std * noise


def log_prob(x_next: Float[Array, "b *d"], mean: Float[Array, "b *d"], std: Scalar) -> Float[Array, " b"]:
    """Log-density of one transition, averaged over everything but the batch.

        log p(x'|x) = mean_d[ -(x'_d - m_d)² / 2s² - log s - ½ log 2π ]

    The mean (not the sum) keeps the ratio of two policies near 1 for 65,536-dimensional latents; clip
    ranges of 1e-4 belong to this convention. Deterministic steps (s = 0) have no density: exactly 0.
    """
    x_next, mean, std, noisy = _operands(x_next, mean, std)
    safe = jnp.where(noisy, std, 1)
    terms = -0.5 * jnp.square((x_next - mean) / safe) - jnp.log(safe) - HALF_LOG_2PI
    return _per_row(jnp.where(noisy, terms, 0))


def log_prob_unnormalised(
    x_next: Float[Array, "b *d"], mean: Float[Array, "b *d"], std: Scalar | None = None
) -> Float[Array, " b"]:
    """-mean_d (x'_d - m_d)²: what CPS publishes, a reweighting by 2s² of the density, not a density.

    With `std` given, deterministic steps count 0 as in `log_prob`; clip ranges differ from its.
    """
    x_next, mean, _, noisy = _operands(x_next, mean, 1 if std is None else std)
    return _per_row(jnp.where(noisy, -jnp.square(x_next - mean), 0))


LOG_PROBS = {"gaussian": log_prob, "unnormalised": log_prob_unnormalised}


def one_step(x: Float[Array, "*x"], v: Float[Array, "*x"], t: Scalar) -> Float[Array, "*x"]:
    """The clean image that the velocity points at: x0_hat = x - t v."""
    return x - _rows(jnp.asarray(t), x) * v


def forecast(
    velocity: Callable[[Array, Scalar], Array],
    x: Float[Array, "*x"],
    v: Float[Array, "*x"],
    t: Scalar,
    calls: int = 1,
) -> Float[Array, "*x"]:
    """The clean image that `calls` Euler steps of equal length lead to from t, the first of them along v, the
    velocity at x; one of them is `one_step`."""
    if calls == 1:
        return one_step(x, v, t)

    def step(x: Array, i: Array) -> tuple[Array, None]:
        return one_step(x, velocity(x, t * (1 - i / calls)), t / calls), None

    return jax.lax.scan(step, one_step(x, v, t / calls), jnp.arange(1, calls))[0]


def guide(v_neg: Float[Array, "*x"], v_pos: Float[Array, "*x"], scale: Scalar) -> Float[Array, "*x"]:
    """Classifier-free guidance: v_neg + scale (v_pos - v_neg)."""
    return v_neg + scale * (v_pos - v_neg)


def _kl_exact(mean, mean_ref, std, dt, v, v_ref):
    """The Gaussian KL per dimension: mean_d (m - m_ref)² / 2s²."""
    del dt, v, v_ref
    mean, mean_ref, std, noisy = _operands(mean, mean_ref, std)
    return _per_row(jnp.where(noisy, 0.5 * jnp.square((mean - mean_ref) / jnp.where(noisy, std, 1)), 0))


def _kl_flow_grpo(mean, mean_ref, std, dt, v, v_ref):
    """What flow_grpo trains with: mean_d (m - m_ref)² / 2 sigma_t², that is -dt times the exact KL."""
    return -jnp.asarray(dt) * _kl_exact(mean, mean_ref, std, dt, v, v_ref)


def _kl_velocity(mean, mean_ref, std, dt, v, v_ref):
    """mean_d (v - v_ref)²: independent of the sampler; Flow-Factory, DiffusionNFT."""
    del mean, mean_ref, std, dt
    return _per_row(jnp.square(v - v_ref))


KLS = {"flow_grpo": _kl_flow_grpo, "exact": _kl_exact, "velocity": _kl_velocity}


def kl(
    kind: str, mean: Float[Array, "b *d"], mean_ref: Float[Array, "b *d"], std: Scalar, dt: Scalar,
    v: Float[Array, "b *d"], v_ref: Float[Array, "b *d"],
) -> Float[Array, " b"]:  # fmt: skip
    """Distance of a step to the reference policy's, per row; `dt` is a number or [b].

    The weights that papers give belong to one kind each: 0.04 to "flow_grpo", 1e-4..1e-3 to "velocity".
    """
    return choose(KLS, kind, "kl")(mean, mean_ref, std, dt, v, v_ref)


def _rows(s: Array, x: Array) -> Array:
    """[b] -> [b, 1, ...] so that it broadcasts over the rows of x; numbers and full shapes pass."""
    return s.reshape(s.shape + (1,) * (jnp.ndim(x) - 1)) if s.ndim == 1 else s


def _operands(x: Array, mean: Array, std: Scalar) -> tuple[Array, Array, Array, Array]:
    dtype = jnp.promote_types(jnp.result_type(x, mean), jnp.float32)
    std = jnp.broadcast_to(_rows(jnp.asarray(std, dtype), mean), mean.shape)
    return jnp.asarray(x, dtype), jnp.asarray(mean, dtype), std, std > 0


def _per_row(terms: Array) -> Array:
    return terms.mean(axis=tuple(range(1, terms.ndim)))
