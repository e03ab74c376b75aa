"""The transformer of Stable Diffusion 3 / 3.5 (diffusers' `SD3Transformer2DModel`), NHWC.

Image and text tokens run through the same blocks with their own weights and meet in one attention. The
first blocks of SD3.5-M also attend over the image alone ("dual"); the last block drops its text. So the
layers are three stacks, `dual`, `joint` and `last`, each scanned over its own stacked parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import published
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.embeddings import PatchEmbed, TimeTextEmbed
from smart_grpo_jax.models.initializers import SMALL
from smart_grpo_jax.models.layers import (
    Build,
    FeedForward,
    Modulation,
    continuous,
    heads,
    layer_norm,
    modulated,
    repeat_bias,
    stack,
)
from smart_grpo_jax.models.lora import SD3_TARGETS, AtUse, LoRA, as_is


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """transformer/config.json, with diffusers' defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MMDiTConfig:
        """Read transformer/config.json; what is not built is a UserError."""
        return published.read(cls, data, fixed={}, ignored=())

    def __post_init__(self) -> None:
        if self.qk_norm not in (None, "rms_norm"):
            raise UserError(f"MMDiTConfig.qk_norm: got {self.qk_norm!r}, wanted None or 'rms_norm'")
        if self.dual_attention_layers != tuple(range(len(self.dual_attention_layers))):
            raise UserError(
                f"MMDiTConfig.dual_attention_layers: got {self.dual_attention_layers}, wanted 0, 1, …, n-1"
            )
        if len(self.dual_attention_layers) > self.num_layers:
            raise UserError(f"MMDiTConfig.dual_attention_layers: more than num_layers = {self.num_layers}")
        if self.caption_projection_dim != self.width:
            raise UserError(
                f"MMDiTConfig.caption_projection_dim: got {self.caption_projection_dim}, wanted {self.width}"
            )

    @property
    def width(self) -> int:
        """Features of a token: heads × features per head."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.in_channels

    @property
    def token_side(self) -> int:
        """Latents per token along a side."""
        return self.patch_size

    @property
    def longest_side(self) -> int | None:
        """Most tokens along a side: what the stored table of positions holds."""
        return self.pos_embed_max_size

    @property
    def default_side(self) -> int:
        """Latents along a side of the default image."""
        return self.sample_size

    @property
    def fixed(self) -> tuple[str, ...]:
        """Parameters that are data and never learned."""
        return ("pos_embed/pos_embed",)

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network."""
        return False

    @property
    def channels(self) -> int:
        """Channels of the velocity."""
        return self.out_channels or self.in_channels

    def stacks(self) -> tuple[tuple[str, int, bool], ...]:
        """(name, length, dual?) of the stacks that exist, in order; the last layer stands alone."""
        dual, total = len(self.dual_attention_layers), self.num_layers
        rows = (
            ("dual", min(dual, total - 1), True),
            ("joint", total - 1 - min(dual, total - 1), False),
            ("last", 1, dual == total),
        )
        return tuple(row for row in rows if row[1])


class Attention(nn.Module):
    """Attention over image tokens, followed by text tokens where there are any."""

    build: Build
    drops_text: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], text: Float[Array, "b t d"] | None = None, bias: Array | None = None
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b t d"] | None]:
        """The attended image, and the attended text unless there is none or it is dropped."""
        c, length = self.build.config, x.shape[1]
        q, k, v = heads(self.build, x, "to", "", "norm" if c.qk_norm else None)
        if text is not None:
            added = heads(self.build, text, "add", "_proj", "norm_added" if c.qk_norm else None)
            k, v = jnp.concatenate([k, added[1]], 1), jnp.concatenate([v, added[2]], 1)
            if not self.drops_text:  # the published last block computes text queries and throws them away
                q = jnp.concatenate([q, added[0]], 1)
        out = attend(q, k, v, bias, self.build.attention)
        out = out.reshape(*out.shape[:2], c.width)
        image = self.build.dense(c.width, "to_out_0")(out[:, :length])
        if text is None or self.drops_text:
            return image, None
        return image, self.build.dense(c.width, "to_add_out")(out[:, length:])


class Block(nn.Module):
    """One layer; `dual` adds an attention over the image alone, `last` drops the text at the end."""

    build: Build
    dual: bool
    last: bool

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], temb: Float[Array, "b d"], bias: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        """(image [b,s,d], text [b,t,d]) → the same, one layer on; the form that `nn.scan` wants."""
        x, text = streams
        m = Modulation(self.build, 9 if self.dual else 6, name="norm1")(temb)
        normed = layer_norm(x)
        if self.last:
            text_in = continuous(self.build, text, temb, "norm1_context")
        else:
            c = Modulation(self.build, 6, name="norm1_context")(temb)
            text_in = modulated(layer_norm(text), c[0], c[1])
        joint = Attention(self.build, self.last, name="attn")
        image_out, text_out = joint(modulated(normed, m[0], m[1]), text_in, bias)
        x = x + m[2][:, None] * image_out
        if self.dual:
            alone, _ = Attention(self.build, name="attn2")(modulated(normed, m[6], m[7]))
            x = x + m[8][:, None] * alone
        feed = FeedForward(self.build, name="ff")
        x = x + m[5][:, None] * feed(modulated(layer_norm(x), m[3], m[4]))
        if not self.last:
            assert text_out is not None
            text = text + c[2][:, None] * text_out
            feed = FeedForward(self.build, name="ff_context")
            text = text + c[5][:, None] * feed(modulated(layer_norm(text), c[3], c[4]))
        return (x, text), None


class MMDiT(nn.Module):
    """The velocity network: v = x1 - x0 predicted from x_t, t and the text."""

    config: MMDiTConfig
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = SD3_TARGETS
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    at_use: AtUse = as_is

    @property
    def lora(self) -> LoRA:
        """The adapters of this network."""
        return LoRA(self.lora_rank, self.lora_alpha, self.lora_targets)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        tokens: Float[Array, "b s d"],
        pooled: Float[Array, "b p"],
        repeats: int = 1,
    ) -> Float[Array, "b h w c"]:
        """The velocity, float32. The last text token counts as `repeats` equal ones."""
        c, build = self.config, Build(self.config, self.lora, self.dtype, self.attention, self.at_use)
        b, h, w, _ = x.shape
        image = PatchEmbed(build, name="pos_embed")(x.astype(self.dtype))
        temb = TimeTextEmbed(build, name="time_text_embed")(t, pooled.astype(self.dtype))
        text = build.dense(c.width, "context_embedder")(tokens)
        bias = repeat_bias(image.shape[1] + text.shape[1], -1, repeats)
        streams = (image, text)
        for name, length, dual in c.stacks():
            layers = stack(Block, length, self.remat, shared=2)(build, dual, name == "last", name=name)
            streams, _ = layers(streams, temb, bias)
        normed, p = continuous(build, streams[0], temb, "norm_out"), c.patch_size
        out = build.dense(p * p * c.channels, "proj_out", SMALL)(normed)
        out = out.reshape(b, h // p, w // p, p, p, c.channels).transpose(0, 1, 3, 2, 4, 5)
        return out.reshape(b, h, w, c.channels).astype(jnp.float32)
