"""How fresh parameters are drawn.

Flax traces the initialiser of every parameter each time a network is applied, to compare shapes; jit keeps
those traces, so that a program with hundreds of parameters is traced in half the time.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

Initializer = Callable[..., jax.Array]


def traced_once(init: Initializer) -> Initializer:
    """`init(key, shape, dtype)` whose trace is kept for each shape and dtype."""
    return jax.jit(init, static_argnums=(1, 2))


XAVIER = traced_once(nn.initializers.xavier_uniform())
LECUN = traced_once(nn.initializers.lecun_normal())
SMALL = traced_once(nn.initializers.normal(0.02))
"""Modulations and the output start near zero, so that a fresh network starts near the identity."""

CONVOLUTION = traced_once(nn.initializers.variance_scaling(1.0, "fan_in", "normal"))
ONES = traced_once(nn.initializers.ones)
ZEROS = traced_once(nn.initializers.zeros)
