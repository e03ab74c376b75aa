"""Attention behind one function; the softmax is float32 whatever the arrays are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest

CHUNK = 256


def attend(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    bias: Float[Array, "#b #h #s t"] | None = None,
    implementation: str = "xla",
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """softmax(q kᵀ·scale + bias) v, the scale 1/√d where none is given.

    `bias` adds to the logits: a causal mask, or log n for a key that stands for n equal ones.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention: got {implementation!r}, {nearest(implementation, IMPLEMENTATIONS)}")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q, k, v, bias, factor)


def xla(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    """Two matmuls; all logits [b,h,s,t] exist at once."""
    logits = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    logits = logits if bias is None else logits + bias
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, -1).astype(v.dtype), v)


def chunked(q: Array, k: Array, v: Array, bias: Array | None, scale: float) -> Array:
    """A scan over blocks of queries: logits of CHUNK queries at a time, recomputed for the gradient."""
    b, s, h, d = q.shape
    blocks = -(-s // CHUNK)
    pad = blocks * CHUNK - s
    qs = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(b, blocks, CHUNK, h, d)
    rows = None
    if bias is not None and bias.shape[2] != 1:
        rows = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0)))
        rows = jnp.moveaxis(rows.reshape(*bias.shape[:2], blocks, CHUNK, bias.shape[3]), 2, 0)

    @jax.checkpoint
    def block(_: None, one: tuple[Array, Array | None]) -> tuple[None, Array]:
        return None, xla(one[0], k, v, bias if one[1] is None else one[1], scale)

    _, out = jax.lax.scan(block, None, (jnp.moveaxis(qs, 1, 0), rows))
    return jnp.moveaxis(out, 0, 1).reshape(b, blocks * CHUNK, h, d)[:, :s]


IMPLEMENTATIONS: Mapping[str, Callable[[Array, Array, Array, Array | None, float], Array]] = {
    "xla": xla,
    "chunked": chunked,
}
