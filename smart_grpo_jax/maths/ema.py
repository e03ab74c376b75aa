"""The averaged policy that is evaluated: an exponential mean with a warm-up, updated now and then."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


def decay(step: ArrayLike, max_decay: ArrayLike = 0.9) -> Float[Array, "*s"]:
    """min((1 + s) / (10 + s), max_decay) after s optimizer steps."""
    step = jnp.asarray(step)
    return jnp.minimum((1 + step) / (10 + step), max_decay)


def due(step: ArrayLike, every: int = 8) -> Bool[Array, "*s"]:
    """Whether optimizer step s (from 0) ends a stretch of `every` steps."""
    return (jnp.asarray(step) + 1) % every == 0


def update(ema: Any, params: Any, decay: ArrayLike) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf, in the dtype of `ema`."""
    return jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, params)
