"""How much each step of the sampler counts in the loss. docs/algorithm.md, section 4."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smart_grpo_jax.maths.choice import choose


def _uniform(std: Array, times: Array, trained: Array) -> Array:
    """1 everywhere: Flow-GRPO."""
    del times, trained
    return jnp.ones_like(std)


def _tempflow(std: Array, times: Array, trained: Array) -> Array:
    """s_j over its mean on the trained steps: TempFlow-GRPO, more weight where the noise decides more."""
    del times
    return std / std[trained].mean()


def _guard(std: Array, times: Array, trained: Array) -> Array:
    """1 / (t - t'): GRPO-Guard, which takes the step length out of the gradient."""
    del trained
    return (1 / (times[:-1] - times[1:])).astype(std.dtype)


STEP_WEIGHTS = {"uniform": _uniform, "tempflow": _tempflow, "guard": _guard}


def step_weights(
    kind: str,
    std: Float[Array, " steps"],
    times: Float[Array, " steps_plus_1"],
    trained: Int[Array, " trained"],
) -> Float[Array, " steps"]:
    """The weight of every step, from the steps' stds (`transition.stds`), times and trained indices."""
    return choose(STEP_WEIGHTS, kind, "step weight")(
        jnp.asarray(std), jnp.asarray(times), jnp.asarray(trained)
    )
