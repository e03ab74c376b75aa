"""Attention that never writes its logits: Pallas' splash kernel on a TPU, cuDNN's flash kernel on a GPU.

Neither can be cut by the compiler, so each device runs the kernel on its own rows and heads (`by_device`).
Neither takes a bias at full precision, so a bias of the keys becomes features of queries and keys (`folded`).
Keys beyond the true length never weigh anything: splash masks them by segment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

ROWS, HEADS = ("data", "fsdp"), "tensor"
"""Mesh axes of the batch and of the heads."""

BLOCKS = (512, 384, 256)
"""Tokens that a core of a TPU takes at once; sequences are padded to a multiple of one of them."""

SHORT = 128
"""The block of sequences that fit in one row of vector lanes."""

PIECES = 3
"""bfloat16 has 8 significant bits: three numbers hold the 24 of a float32 bias."""

CUDNN_WIDTH = 8
"""Features of a head come in multiples of this."""


def splash(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    bias: Float[Array, "#b #h 1 t"] | None,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "b s h d"]:
    """Splash attention. The scale is multiplied into q: exact for 64 features, one rounding of q for 128.

    `interpret` runs the kernel's definition on any platform, slowly.
    """
    q, k = folded(q * jnp.asarray(scale, q.dtype), k, bias)
    return by_device(partial(splash_here, interpret=interpret), q, k, v)


def splash_here(q: Array, k: Array, v: Array, interpret: bool) -> Array:
    """The kernel on one device; images and heads are one axis, since no two of them meet."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    (b, s, h, _), t = q.shape, k.shape[1]
    (rows, many), (columns, keys) = tiles(s), tiles(t)
    sizes = pallas.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    mask = pallas.MultiHeadMask([pallas.FullMask((many, keys))] * (b * h))
    kernel = pallas.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    segments = None
    if keys > t:  # padded queries see the true keys too: a row without any key would divide by zero
        segments = pallas.SegmentIds(jnp.ones(many, jnp.int32), (jnp.arange(keys) < t).astype(jnp.int32))
    out = cast(Array, kernel(heads_first(q, many), heads_first(k, keys), heads_first(v, keys), segments))
    return out[:, :s].reshape(b, h, s, -1).transpose(0, 2, 1, 3)


def tiles(tokens: int) -> tuple[int, int]:
    """(block, padded length): the block that pads least, the largest among equals."""
    if tokens <= SHORT:
        return SHORT, SHORT
    padded, block = min((-(-tokens // block) * block, -block) for block in BLOCKS)
    return -block, padded


def heads_first(x: Float[Array, "b s h d"], tokens: int) -> Float[Array, "b*h n d"]:
    """The layout of the kernel, padded with zeros."""
    b, s, h, d = x.shape
    return jnp.pad(x.transpose(0, 2, 1, 3).reshape(b * h, s, d), ((0, 0), (0, tokens - s), (0, 0)))


def cudnn(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    bias: Float[Array, "#b #h 1 t"] | None,
    scale: float,
) -> Float[Array, "b s h d"]:
    """cuDNN's flash attention; its own bias would be in the type of q and want even lengths."""
    width = q.shape[-1]
    q, k = folded(q, k, None if bias is None else bias / scale)
    q, k, v = (widened(x, -(-q.shape[-1] // CUDNN_WIDTH) * CUDNN_WIDTH) for x in (q, k, v))
    run = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return by_device(run, q, k, v)[..., :width]


def widened(x: Array, width: int) -> Array:
    """Zeros behind the features."""
    return jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),))


def folded(
    q: Float[Array, "b s h d"], k: Float[Array, "b t h d"], bias: Float[Array, "#b #h 1 t"] | None
) -> tuple[Float[Array, "b s h e"], Float[Array, "b t h e"]]:
    """q' k'ᵀ = q kᵀ + bias: ones behind the queries, the bias in PIECES of the keys' type behind the keys."""
    if bias is None:
        return q, k
    kind = jnp.finfo(k.dtype)
    rest = jnp.maximum(jnp.asarray(bias, jnp.float32), float(kind.min) / 2)  # -inf has no pieces
    pieces = []
    for _ in range(PIECES):
        # astype and back would be optimised away, and the remainder with it
        pieces.append(jax.lax.reduce_precision(rest, kind.nexp, kind.nmant))
        rest = rest - pieces[-1]
    column = jnp.concatenate(pieces, 2).transpose(0, 3, 1, 2).astype(k.dtype)
    ones = jnp.ones((*q.shape[:-1], PIECES), q.dtype)
    column = jnp.broadcast_to(column, (*k.shape[:-1], PIECES))
    return jnp.concatenate([q, ones], -1), jnp.concatenate([k, column], -1)


def by_device(kernel: Callable[[Array, Array, Array], Array], q: Array, k: Array, v: Array) -> Array:
    """The kernel on the rows and heads of each device of the mesh in force; without one, as it is.

    Rows or heads that do not divide are computed on every device of the axes that are left.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    free = {name: size for name, size, kind in axes if kind != AxisType.Manual}
    if mesh.size == 1 or not free:
        return kernel(q, k, v)
    spec = PartitionSpec(dividing(q.shape[0], ROWS, free), None, dividing(q.shape[2], (HEADS,), free))
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, axis_names=set(free), check_vma=False)(
        q, k, v
    )


def dividing(length: int, axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[str, ...]:
    """The axes over which a length is spread: as many as divide it, from the front."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        if axis in sizes and length % int(np.prod([sizes[a] for a in (*taken, axis)])) == 0:
            taken = (*taken, axis)
    return taken
