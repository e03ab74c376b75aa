"""The encoder of T5 (transformers' `T5EncoderModel`): v1.1 with gated GELU, and the first one with ReLU.

Nothing has a bias, norms have no mean, logits are not scaled, and a table over buckets of relative
positions adds to the logits of every block. The blocks are one scanned stack. No attention mask: the
pipelines give none, so padding is attended to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models import published
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.initializers import LECUN, ONES, SMALL

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}

FEED_FORWARDS: Mapping[str, tuple[str, bool]] = {"gated-gelu": ("gelu_new", True), "relu": ("relu", False)}

WITHOUT_EFFECT = (
    "architectures",
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "dtype",
    "eos_token_id",
    "feed_forward_proj",  # `from_json` turns it into the two entries that count
    "initializer_factor",
    "is_encoder_decoder",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "pad_token_id",
    "scale_decoder_outputs",
    "task_specific_params",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """config.json of a T5 encoder, with transformers' defaults."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> T5Config:
        """Read text_encoder_x/config.json; what is not built is a UserError.

        As in transformers, `feed_forward_proj` decides unless the file also spells out its two halves.
        """
        name = data.get("feed_forward_proj", "relu")
        if name not in FEED_FORWARDS:
            raise UserError(f"T5Config.feed_forward_proj: got {name!r}, {nearest(str(name), FEED_FORWARDS)}")
        act, gated = FEED_FORWARDS[name]
        data = {"dense_act_fn": act, "is_gated_act": gated, **data}
        fixed = {"model_type": ("t5",), "is_decoder": (False,)}
        return published.read(cls, data, fixed=fixed, ignored=WITHOUT_EFFECT)

    def __post_init__(self) -> None:
        if self.dense_act_fn not in ACTIVATIONS:
            hint = nearest(str(self.dense_act_fn), ACTIVATIONS)
            raise UserError(f"T5Config.dense_act_fn: got {self.dense_act_fn!r}, {hint}")
        if self.relative_attention_num_buckets < 4:
            raise UserError(
                "T5Config.relative_attention_num_buckets: got "
                f"{self.relative_attention_num_buckets}, wanted 4 or more"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise UserError(
                "T5Config.relative_attention_max_distance: got "
                f"{self.relative_attention_max_distance}, wanted more than a quarter of the buckets"
            )


def buckets(length: int, count: int, max_distance: int) -> Int[np.ndarray, "s t"]:
    """The row of the bias table for each (query, key).

    With n = |key - query| and h = count/2 rows for each direction: n itself below h/2, then logarithmic
    steps that end at `max_distance`; keys after the query take the second half of the rows.
    On the host: an accelerator's logarithm may fall on the other side of a step.
    """
    half = count // 2
    exact = half // 2
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    n = np.abs(relative)
    steps = np.log(np.maximum(n, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int64), half - 1)
    return (np.where(relative > 0, half, 0) + np.where(n < exact, n, far)).astype(np.int32)


class RMSNorm(nn.Module):
    """x/√(mean x² + eps)·scale, float32 inside."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The dtype of the network outside."""
        scale = self.param("scale", ONES, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Build:
    """What all parts share: the config and the compute dtype."""

    config: T5Config
    dtype: Any

    def dense(self, features: int, name: str) -> nn.Dense:
        """A linear layer without bias."""
        return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=LECUN, name=name)

    def norm(self, name: str) -> RMSNorm:
        """A norm of the network."""
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype, name=name)


class SelfAttention(nn.Module):
    """Attention whose heads need not fill the width of the network."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "1 h s s"]) -> Float[Array, "b s d"]:
        """o(softmax(q kᵀ + bias) v)."""
        c = self.build.config
        shape = (*x.shape[:-1], c.num_heads, c.d_kv)
        q, k, v = (self.build.dense(c.num_heads * c.d_kv, n)(x).reshape(shape) for n in ("q", "k", "v"))
        y = attend(q, k, v, bias, scale=1.0).reshape(*x.shape[:-1], -1)
        return self.build.dense(x.shape[-1], "o")(y)


class FeedForward(nn.Module):
    """wo(act(wi_0 x) · wi_1 x), or wo(act(wi x)) without the gate."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The token-wise half of a block."""
        c = self.build.config
        h = ACTIVATIONS[c.dense_act_fn](self.build.dense(c.d_ff, "wi_0" if c.is_gated_act else "wi")(x))
        if c.is_gated_act:
            h = h * self.build.dense(c.d_ff, "wi_1")(x)
        return self.build.dense(x.shape[-1], "wo")(h)


class AttentionLayer(nn.Module):
    """`layer.0` of a published block: x + attention(norm x)."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "1 h s s"]) -> Float[Array, "b s d"]:
        """The first residual."""
        return x + SelfAttention(self.build, name="SelfAttention")(self.build.norm("layer_norm")(x), bias)


class FeedForwardLayer(nn.Module):
    """`layer.1` of a published block: x + feed-forward(norm x); its name there is older than its GELU."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The second residual."""
        return x + FeedForward(self.build, name="DenseReluDense")(self.build.norm("layer_norm")(x))


class Block(nn.Module):
    """One step of the scan."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], bias: Float[Array, "1 h s s"]) -> tuple[Array, None]:
        """Both residuals."""
        x = AttentionLayer(self.build, name="layer_0")(x, bias)
        return FeedForwardLayer(self.build, name="layer_1")(x), None


class T5Encoder(nn.Module):
    """Token ids → the last hidden states, normed."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Every token attends to every other, in any sequence length."""
        c, build = self.config, Build(self.config, self.dtype)
        table = self.param("shared", SMALL, (c.vocab_size, c.d_model))
        count = c.relative_attention_num_buckets
        by_bucket = self.param("relative_attention_bias", SMALL, (count, c.num_heads))
        rows = buckets(ids.shape[1], count, c.relative_attention_max_distance)
        bias = jnp.moveaxis(by_bucket.astype(jnp.float32)[rows], -1, 0)[None]
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (flax annotates int alone)
            length=c.num_layers,
        )
        x, _ = blocks(build, name="block")(table[ids].astype(self.dtype), bias)
        return build.norm("final_layer_norm")(x)
