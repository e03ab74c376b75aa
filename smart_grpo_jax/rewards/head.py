"""The five linear layers at the end of ImageReward and of the aesthetic predictor, as the one they are.

There is no activation between them, so that W5 (W4 (… (W1 x + b1) …) + b4) + b5 = w x + b: two numbers per
feature instead of a million. Folded in float64, applied in float32; in bfloat16 the five layers alone would
move an aesthetic score by .02, a tenth of what it tells apart in a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import tables
from smart_grpo_jax.hub.reward_weights import HEAD_LAYERS
from smart_grpo_jax.hub.streaming import Reader

HIGHEST = jax.lax.Precision.HIGHEST


def load(table: tables.Table, reader: Reader, features: int) -> PyTree:
    """The layers of a head for this many features; its inner widths are the file's."""
    widths = [features]
    for layer in HEAD_LAYERS:
        _, key = table.place(f"layers_{layer}/kernel")
        if key not in reader.keys():
            raise UserError(f"{reader.file(key)}: {table.name} lacks {key!r}")
        widths.append((reader.shape(key) or (0,))[0])
    if widths[-1] != 1:
        raise UserError(f"{reader.file('')}: {table.name} gives {widths[-1]} numbers, wanted 1")
    return tables.to_params(table, tuple(widths), reader, jnp.float32)


def folded(layers: PyTree, mean: float = 0.0, std: float = 1.0) -> PyTree:
    """{w, b} with (head(x) - mean) / std = w x + b."""
    weight = np.eye(len(layers[f"layers_{HEAD_LAYERS[0]}"]["kernel"]))
    bias = np.zeros(len(weight))
    for layer in HEAD_LAYERS:
        kernel = np.asarray(layers[f"layers_{layer}"]["kernel"], np.float64)
        weight = weight @ kernel
        bias = bias @ kernel + np.asarray(layers[f"layers_{layer}"]["bias"], np.float64)
    return {
        "weight": jnp.asarray(weight[:, 0] / std, jnp.float32),
        "bias": jnp.asarray((bias[0] - mean) / std, jnp.float32),
    }


def affine(params: PyTree, x: Float[Array, "b d"]) -> Float[Array, " b"]:
    """w x + b."""
    return jnp.matmul(x, params["weight"], precision=HIGHEST) + params["bias"]


def layered(layers: PyTree, x: Float[Array, "b d"]) -> Float[Array, " b"]:
    """The same, layer by layer: the debugging path, and the test of the folding."""
    for layer in HEAD_LAYERS:
        one = layers[f"layers_{layer}"]
        x = jnp.matmul(x, one["kernel"], precision=HIGHEST) + one["bias"]
    return x[:, 0]
