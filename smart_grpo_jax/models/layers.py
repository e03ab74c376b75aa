"""What the transformers of SD3 and FLUX are made of; both name their parameters as the published files do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models.initializers import ONES, SMALL, XAVIER
from smart_grpo_jax.models.lora import AtUse, LoRA, LoRADense, as_is


@dataclasses.dataclass(frozen=True)
class Build:
    """What all parts of one network share: config, adapters, compute dtype, attention, parameters at use."""

    config: Any
    lora: LoRA
    dtype: Any
    attention: str
    at_use: AtUse = as_is

    def dense(self, features: int, name: str, kernel_init: Any = XAVIER) -> LoRADense:
        """A linear layer of the network."""
        options = {"dtype": self.dtype, "kernel_init": kernel_init, "at_use": self.at_use}
        return LoRADense(features, self.lora, **options, name=name)


def layer_norm(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """(x - mean)/√(var + 1e-6) with float32 statistics and no affine part."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulated(x: Float[Array, "b s d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Array:
    """x·(1 + scale) + shift, the same for all tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


def gelu(x: Array) -> Array:
    """The tanh form; the exact one differs by up to 5e-4."""
    return nn.gelu(x, approximate=True)


class HeadNorm(nn.Module):
    """RMS norm over the features of a head, shared by the heads: x/√(mean x² + 1e-6)·scale."""

    @nn.compact
    def __call__(self, x: Float[Array, "b s h d"]) -> Float[Array, "b s h d"]:
        """Float32 inside; the dtype of x outside."""
        scale = self.param("scale", ONES, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Modulation(nn.Module):
    """Linear(silu(temb)) cut into `chunks` vectors [b, width]."""

    build: Build
    chunks: int

    @nn.compact
    def __call__(self, temb: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """The chunks, in the published order of the layer that uses them."""
        width = self.build.config.width
        return jnp.split(
            self.build.dense(self.chunks * width, "linear", SMALL)(nn.silu(temb)), self.chunks, -1
        )


def continuous(build: Build, x: Float[Array, "b s d"], temb: Float[Array, "b d"], name: str) -> Array:
    """AdaLN-continuous, the norm that no gate follows: its chunks are scale, shift, not shift, scale."""
    scale, shift = Modulation(build, 2, name=name)(temb)
    return modulated(layer_norm(x), shift, scale)


class Projection(nn.Module):
    """`proj` of the published feed-forward: a linear layer and the tanh-GELU."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s 4*d"]:
        """gelu(W x)."""
        return gelu(self.build.dense(4 * self.build.config.width, "proj")(x))


class FeedForward(nn.Module):
    """Linear to 4·width, tanh-GELU, linear back."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The token-wise half of a block."""
        return self.build.dense(self.build.config.width, "net_2")(Projection(self.build, name="net_0")(x))


def heads(
    build: Build, x: Float[Array, "b s d"], prefix: str, suffix: str, norms: str | None
) -> tuple[Array, Array, Array]:
    """Queries, keys and values [b,s,h,d]; queries and keys normalised where `norms` names the norms."""
    c = build.config
    shape = (*x.shape[:-1], c.num_attention_heads, c.attention_head_dim)
    q, k, v = (build.dense(c.width, f"{prefix}_{n}{suffix}")(x).reshape(shape) for n in "qkv")
    if norms:
        q, k = HeadNorm(name=f"{norms}_q")(q), HeadNorm(name=f"{norms}_k")(k)
    return q, k, v


REMAT: Mapping[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(block: Any, length: int, remat: str, shared: int) -> Any:
    """The block class scanned over `length` layers of stacked parameters.

    A block maps (carry, *shared) → (carry, None); all layers get the same `shared` arrays.
    """
    if remat not in REMAT:
        raise UserError(f"memory.remat: got {remat!r}, {nearest(remat, REMAT)}")
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * shared,  # pyright: ignore[reportArgumentType] (flax says int)
        length=length,
    )


def repeat_bias(keys: int, index: int, repeats: int) -> Float[Array, "1 1 1 s"] | None:
    """log(repeats) on the logit of one key: n equal keys weigh n·exp(logit) = exp(logit + log n)."""
    if repeats == 1:
        return None
    return jnp.zeros((1, 1, 1, keys)).at[..., index].set(np.log(repeats))
