"""The text encoder of CLIP (transformers' `CLIPTextModel`, with or without projection).

The encoder layers are one scanned stack; `Encoder` knows neither text nor images, so that a vision tower
can use it as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models import published
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.initializers import SMALL

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

PROJECTION: Mapping[str, bool] = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}

LEGACY_EOS = 2
"""The id that published configs give where the end token is simply the largest id of a prompt."""

WITHOUT_EFFECT = (
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dropout",
    "dtype",
    "initializer_factor",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """config.json of a CLIP text encoder, with transformers' defaults; `projection` is the class's."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int | tuple[int, ...] = 49407
    projection: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CLIPConfig:
        """Read text_encoder/config.json; what is not built is a UserError."""
        fixed = {"model_type": ("clip_text_model",)}
        config = published.read(cls, data, fixed=fixed, ignored=WITHOUT_EFFECT)
        name = (data.get("architectures") or ["CLIPTextModelWithProjection"])[0]
        if name not in PROJECTION:
            raise UserError(f"CLIPConfig.architectures: got {name!r}, {nearest(name, PROJECTION)}")
        return dataclasses.replace(config, projection=PROJECTION[name])

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            hint = nearest(self.hidden_act, ACTIVATIONS)
            raise UserError(f"CLIPConfig.hidden_act: got {self.hidden_act!r}, {hint}")


class CLIPOutput(NamedTuple):
    """`penultimate` is the state before the last layer, without the final norm; `last` has it."""

    penultimate: Float[Array, "b s d"]
    last: Float[Array, "b s d"]
    pooled: Float[Array, "b p"]


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, with biases."""

    heads: int
    hidden: int
    act: str
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Array | None) -> tuple[Array, Array]:
        """One layer; gives its input as well, the scan's list of hidden states."""
        normed = nn.LayerNorm(self.eps, dtype=self.dtype, name="layer_norm1")(x)
        y = x + SelfAttention(self.heads, self.dtype, name="self_attn")(normed, bias)
        normed = nn.LayerNorm(self.eps, dtype=self.dtype, name="layer_norm2")(y)
        return y + MLP(self.hidden, self.act, self.dtype, name="mlp")(normed), x


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Array | None) -> Float[Array, "b s d"]:
        """`bias` adds to the logits."""
        shape = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (nn.Dense(x.shape[-1], dtype=self.dtype, name=n)(x).reshape(shape) for n in names)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out_proj")(
            attend(q, k, v, bias).reshape(x.shape)
        )


class MLP(nn.Module):
    """Linear, activation, linear."""

    hidden: int
    act: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The token-wise half of a layer."""
        h = ACTIVATIONS[self.act](nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class Encoder(nn.Module):
    """The stack of layers, scanned."""

    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Array | None) -> tuple[Array, Array]:
        """The state after the last layer, and before it."""
        c = self.config
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (flax annotates int alone)
            length=c.num_hidden_layers,
        )
        sizes = (c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps)
        x, before = layers(*sizes, self.dtype, name="layers")(x, bias)
        return x, before[-1]


class CLIPText(nn.Module):
    """Token ids → hidden states and one pooled vector."""

    config: CLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> CLIPOutput:
        """Causal attention, no padding mask: the pipelines give none."""
        c, length = self.config, ids.shape[1]
        table = self.param("token_embedding", SMALL, (c.vocab_size, c.hidden_size))
        positions = self.param("position_embedding", SMALL, (c.max_position_embeddings, c.hidden_size))
        x = table[ids].astype(self.dtype) + positions[:length].astype(self.dtype)
        mask = np.triu(np.full((length, length), np.finfo(np.float32).min, np.float32), 1)[None, None]
        x, penultimate = Encoder(c, self.dtype, name="encoder")(x, jnp.asarray(mask))
        last = nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
        pooled = jnp.take_along_axis(last, end_positions(ids, c.eos_token_id)[:, None, None], 1)[:, 0]
        if c.projection:
            pooled = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")(
                pooled
            )
        return CLIPOutput(penultimate, last, pooled)


def end_positions(ids: Int[Array, "b s"], eos: int | tuple[int, ...]) -> Int[Array, " b"]:
    """Where the pooled vector is read: the largest id (legacy configs), else the first end token."""
    if eos == LEGACY_EOS:
        return jnp.argmax(ids, -1)
    ends = jnp.asarray((eos,) if isinstance(eos, int) else eos)
    return jnp.argmax((ids[..., None] == ends).any(-1).astype(jnp.int32), -1)
