"""BLIP as ImageReward uses it: a ViT sees the image, a BERT reads the prompt and looks at the image.

    image = norm(ViT(pixels))                          all tokens, not the first alone
    h = LN(words + positions)                          no token types
    each layer:  h = LN(h + self(h));  h = LN(h + cross(h, image));  h = LN(h + ffn(h))
    score = affine(h[:, 0])                            [CLS]

Both GELUs are exact. The parts name their parameters as the published file does, except that the layers
of the ViT are CLIP's pre-norm encoder, which computes the same thing (hub/reward_weights.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.clip import Encoder
from smart_grpo_jax.models.initializers import SMALL, ZEROS

PADDING = -10000.0
"""What BLIP adds to the logits of padding tokens."""


def check_heads(tower: str, width: int, heads: int) -> None:
    """UserError where the heads do not divide the width."""
    if heads < 1 or width % heads:
        raise UserError(f"{tower}: got {heads} heads, wanted a divisor of the width {width}")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The vision tower; the defaults are ViT-L/16 at 224 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_heads("ViT", self.hidden_size, self.num_attention_heads)

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The text tower (med_config.json); the defaults are BERT-base with BLIP's two tokens more."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    encoder_width: int = 1024

    def __post_init__(self) -> None:
        check_heads("BERT", self.hidden_size, self.num_attention_heads)


@dataclasses.dataclass(frozen=True)
class BLIPConfig:
    """Both towers."""

    vision: ViTConfig = ViTConfig()
    text: BertConfig = BertConfig()


class ViT(nn.Module):
    """Normalised images → the states of all tokens."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b n d"]:
        """Pre-norm layers between a biased patch convolution and the last norm."""
        c, size = self.config, (self.config.patch_size, self.config.patch_size)
        x = nn.Conv(c.hidden_size, size, size, "VALID", dtype=self.dtype, name="patch_embed")(images)
        x = x.reshape(x.shape[0], -1, c.hidden_size)
        first = self.param("cls_token", ZEROS, (1, 1, c.hidden_size)).astype(self.dtype)
        positions = self.param("pos_embed", SMALL, (1, c.tokens, c.hidden_size)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, c.hidden_size)), x], 1) + positions
        x, _ = Encoder(c, self.dtype, name="blocks")(x, None)
        return nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="norm")(x)


class Attention(nn.Module):
    """`query` of x, `key` and `value` of what is looked at; then `output` with residual and norm."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], seen: Float[Array, "b n e"], bias: Array | None) -> Array:
        """LN(x + W attention(x, seen))."""
        looked = Heads(self.config, self.dtype, name="self")(x, seen, bias)
        return Output(self.config, self.dtype, name="output")(looked, x)


class Heads(nn.Module):
    """Multi-head attention without its output projection."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], seen: Float[Array, "b n e"], bias: Array | None) -> Array:
        """`bias` adds to the logits."""
        c = self.config
        split = lambda a: a.reshape(*a.shape[:-1], c.num_attention_heads, -1)
        q = nn.Dense(c.hidden_size, dtype=self.dtype, name="query")(x)
        k = nn.Dense(c.hidden_size, dtype=self.dtype, name="key")(seen)
        v = nn.Dense(c.hidden_size, dtype=self.dtype, name="value")(seen)
        return attend(split(q), split(k), split(v), bias).reshape(x.shape)


class Output(nn.Module):
    """LN(x + W y), the end of every half of a post-norm layer."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, y: Float[Array, "b s f"], x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The norm's eps is BERT's 1e-12."""
        c = self.config
        y = nn.Dense(c.hidden_size, dtype=self.dtype, name="dense")(y)
        return nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(x + y)


class Intermediate(nn.Module):
    """gelu(W x)."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s f"]:
        """The exact GELU."""
        y = nn.Dense(self.config.intermediate_size, dtype=self.dtype, name="dense")(x)
        return jax.nn.gelu(y, approximate=False)


class BertLayer(nn.Module):
    """Self-attention, cross-attention to the image, feed-forward."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], image: Float[Array, "b n e"], bias: Array
    ) -> tuple[Array, None]:
        """(state, nothing): the form that nn.scan wants."""
        c = self.config
        x = Attention(c, self.dtype, name="attention")(x, x, bias)
        x = Attention(c, self.dtype, name="crossattention")(x, image, None)
        y = Intermediate(c, self.dtype, name="intermediate")(x)
        return Output(c, self.dtype, name="output")(y, x), None


class Embeddings(nn.Module):
    """Words and positions, normed."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Token types, which the config mentions, are not part of this network."""
        c = self.config
        words = self.param("word_embeddings", SMALL, (c.vocab_size, c.hidden_size))
        positions = self.param("position_embeddings", SMALL, (c.max_position_embeddings, c.hidden_size))
        x = words[ids].astype(self.dtype) + positions[: ids.shape[1]].astype(self.dtype)
        return nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="LayerNorm")(x)


class Bert(nn.Module):
    """A prompt and an image's tokens → the states of the prompt's tokens."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b s"], mask: Int[Array, "b s"], image: Float[Array, "b n e"]
    ) -> Float[Array, "b s d"]:
        """All tokens see each other, but no padding; every token sees the whole image."""
        x = Embeddings(self.config, self.dtype, name="embeddings")(ids)
        bias = ((1 - mask) * PADDING).astype(jnp.float32)[:, None, None]
        layers = nn.scan(
            BertLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] (flax says int)
            length=self.config.num_hidden_layers,
        )
        x, _ = layers(self.config, self.dtype, name="layer")(x, image, bias)
        return cast(Array, x)


class BLIP(nn.Module):
    """Image and prompt → the state of the prompt's first token, in float32."""

    config: BLIPConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b s s 3"], ids: Int[Array, "b l"], mask: Int[Array, "b l"]
    ) -> Float[Array, "b d"]:
        """What the head of ImageReward reads."""
        image = ViT(self.config.vision, self.dtype, name="visual_encoder")(images)
        states = Bert(self.config.text, self.dtype, name="text_encoder")(ids, mask, image)
        return states[:, 0].astype(jnp.float32)
