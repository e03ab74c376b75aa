"""Attention behind one function; the softmax is float32 whatever the arrays are.

`xla` and `chunked` run anywhere; `cudnn` and `splash` are kernels of one kind of device. `choose` picks by
the devices that will run the program, which are not always those of the process that traces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models.attention_kernels import cudnn, splash

CHUNK = 256

Kernel = Callable[[Array, Array, Array, Array | None, float], Array]


def attend(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    bias: Float[Array, "#b #h #s t"] | None = None,
    implementation: str = "xla",
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """softmax(q kᵀ·scale + bias) v, the scale 1/√d where none is given.

    `bias` adds to the logits: a causal mask, or log n for a key that stands for n equal ones. The kernels of
    devices take a bias that is the same for all queries; with any other, `chunked` is what runs.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention: got {implementation!r}, {nearest(implementation, IMPLEMENTATIONS)}")
    if implementation in NEEDS and bias is not None and bias.shape[2] != 1:
        implementation = "chunked"
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q, k, v, bias, factor)


def xla(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    """Two matmuls; all logits [b,h,s,t] exist at once."""
    logits = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    logits = logits if bias is None else logits + bias
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, -1).astype(v.dtype), v)


def chunked(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    """A scan over blocks of queries: logits of CHUNK queries at a time, recomputed for the gradient.

    Rows and heads stay where they lie: the scan runs along the queries alone.
    """
    b, s, h, d = q.shape
    blocks = -(-s // CHUNK)
    pad = blocks * CHUNK - s
    qs = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, blocks, CHUNK, h, d)
    rows = None
    if bias is not None and bias.shape[2] != 1:
        rows = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0)))
        rows = jnp.moveaxis(rows.reshape(*bias.shape[:2], blocks, CHUNK, bias.shape[3]), 2, 0)

    # The gradients of keys and values are sums over the blocks: float32, rounded once.
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)

    @partial(jax.checkpoint, prevent_cse=False)
    def block(_: None, one: tuple[Array, Array | None]) -> tuple[None, Array]:
        near = keys.astype(k.dtype), values.astype(v.dtype)
        return None, xla(one[0], *near, bias if one[1] is None else one[1], scale)

    _, out = jax.lax.scan(block, None, (jnp.moveaxis(qs, 1, 0), rows))
    return jnp.moveaxis(out, 0, 1).reshape(b, blocks * CHUNK, h, d)[:, :s]


IMPLEMENTATIONS: Mapping[str, Kernel] = {"xla": xla, "chunked": chunked, "cudnn": cudnn, "splash": splash}


class Target(NamedTuple):
    """What the programs will run on and with."""

    platform: str
    capability: float
    dtype: str
    width: int


class Need(NamedTuple):
    """What a kernel asks of a target, and in words."""

    met: Callable[[Target], bool]
    words: str


NEEDS: Mapping[str, Need] = {
    "splash": Need(lambda target: target.platform == "tpu", "a TPU"),
    "cudnn": Need(
        lambda target: (
            target.platform in ("gpu", "cuda")
            and target.capability >= 8
            and target.dtype in ("bfloat16", "float16")
            and target.width % 8 == 0
            and target.width <= 128
        ),
        "an NVIDIA GPU of compute capability 8 or more, bfloat16 and heads of 8, 16 … 128 features",
    ),
}
"""What is not named runs everywhere. `auto` takes the first whose needs are met, else `xla`."""


def target(device: Any, dtype: Any, width: int) -> Target:
    """The target of a network whose heads have `width` features, on a device that need not be here."""
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # AMD's are words
        capability = 0.0
    return Target(device.platform, capability, jnp.dtype(dtype).name, width)


def choose(name: str, aim: Target) -> str:
    """The implementation that `model.attention` = name means on this target; UserError if it cannot run."""
    fit = [known for known in IMPLEMENTATIONS if known not in NEEDS or NEEDS[known].met(aim)]
    if name == "auto":
        return next((known for known in NEEDS if known in fit), "xla")
    if name not in fit:
        raise UserError(
            f"model.attention: got {name}, which needs {NEEDS[name].words}; wanted one of auto, "
            f"{', '.join(fit)} on {aim.platform} with {aim.dtype}"
        )
    return name
