"""The transformer of FLUX.1 (diffusers' `FluxTransformer2DModel`), on unpacked latents, NHWC.

Latents are packed into 2×2 patches inside. Text and image tokens (text first) run through double blocks
with weights of their own, then joined through single blocks; positions enter every attention as rotations
of the queries and keys (RoPE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import published
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.embeddings import TimeTextEmbed
from smart_grpo_jax.models.initializers import SMALL
from smart_grpo_jax.models.layers import (
    Build,
    FeedForward,
    Modulation,
    continuous,
    gelu,
    heads,
    layer_norm,
    modulated,
    repeat_bias,
    stack,
)
from smart_grpo_jax.models.lora import FLUX_TARGETS, AtUse, LoRA, as_is

PATCH = 2
"""Latents per token along a side; the published `patch_size` of 1 counts packed latents."""

LEAST = {
    "in_channels": PATCH**2,
    "attention_head_dim": 1,
    "num_attention_heads": 1,
    "num_layers": 0,
    "num_single_layers": 0,
}

Turns = tuple[Any, Any]
"""cos and sin of the rotations, [tokens, head/2] each."""


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """transformer/config.json, with diffusers' defaults."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FluxConfig:
        """Read transformer/config.json; what is not built is a UserError."""
        return published.read(cls, data, fixed={}, ignored=())

    def __post_init__(self) -> None:
        if self.patch_size != 1:
            raise UserError(f"FluxConfig.patch_size: got {self.patch_size}, wanted 1")
        for name, least in LEAST.items():
            if (got := getattr(self, name)) < least:
                raise UserError(f"FluxConfig.{name}: got {got}, wanted {least} or more")
        if self.in_channels % PATCH**2:
            raise UserError(
                f"FluxConfig.in_channels: got {self.in_channels}, wanted a multiple of {PATCH**2}"
            )
        if self.out_channels not in (None, self.in_channels):
            raise UserError(
                f"FluxConfig.out_channels: got {self.out_channels}, wanted None or in_channels = "
                f"{self.in_channels}"
            )
        axes, head = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != 3 or any(d % 2 or d < 0 for d in axes) or sum(axes) != head:
            raise UserError(
                f"FluxConfig.axes_dims_rope: got {axes}, wanted three even numbers with the sum "
                f"attention_head_dim = {head}"
            )

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.in_channels // PATCH**2

    @property
    def token_side(self) -> int:
        """Latents per token along a side."""
        return PATCH

    @property
    def longest_side(self) -> int | None:
        """Most tokens along a side: rotations know no limit."""
        return None

    @property
    def default_side(self) -> int:
        """Latents along a side of the default image."""
        return 128

    @property
    def fixed(self) -> tuple[str, ...]:
        """Parameters that are data and never learned."""
        return ()

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network."""
        return self.guidance_embeds


def rotations(config: FluxConfig, rows: int, columns: int, text: int) -> Turns:
    """cos and sin [text + rows·columns, head/2] of pos·10000^(-2j/d), for each axis of (0, row, column).

    Text tokens have position 0 on every axis. Float64 inside, as published.
    """
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    positions = np.zeros((text + len(grid), 3))
    positions[text:, 1:] = grid
    angles = [
        positions[:, axis, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
        for axis, d in enumerate(config.axes_dims_rope)
    ]
    joined = np.concatenate(angles, -1)
    return np.cos(joined).astype(np.float32), np.sin(joined).astype(np.float32)


def rotate(x: Float[Array, "b s h d"], turns: Turns) -> Float[Array, "b s h d"]:
    """Each pair of neighbouring features turned by its angle, in float32."""
    cos, sin = (jnp.asarray(a)[None, :, None] for a in turns)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def pack(x: Float[Array, "b h w c"]) -> Float[Array, "b s 4*c"]:
    """2×2 latents → one token, row-major; its features are ordered (channel, row, column)."""
    b, h, w, c = x.shape
    patches = x.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH, c)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, h * w // PATCH**2, PATCH**2 * c)


def unpack(tokens: Float[Array, "b s 4*c"], h: int, w: int) -> Float[Array, "b h w c"]:
    """The inverse of `pack`."""
    b = tokens.shape[0]
    patches = tokens.reshape(b, h // PATCH, w // PATCH, -1, PATCH, PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(b, h, w, -1)


class FluxAttention(nn.Module):
    """Attention over [text, image] tokens; a text that comes apart has weights of its own."""

    build: Build

    @nn.compact
    def __call__(
        self, x: Array, text: Array | None, turns: Turns, bias: Array | None
    ) -> tuple[Array, Array | None]:
        """The attended image and text; where x holds both, it comes back before any projection."""
        width = self.build.config.width
        q, k, v = heads(self.build, x, "to", "", "norm")
        if text is not None:
            added = heads(self.build, text, "add", "_proj", "norm_added")
            q, k, v = (jnp.concatenate(pair, 1) for pair in zip(added, (q, k, v), strict=True))
        out = attend(rotate(q, turns), rotate(k, turns), v, bias, self.build.attention)
        out = out.reshape(*out.shape[:2], width)
        if text is None:
            return out, None
        length = text.shape[1]
        image = self.build.dense(width, "to_out_0")(out[:, length:])
        return image, self.build.dense(width, "to_add_out")(out[:, :length])


class DoubleBlock(nn.Module):
    """Image and text side by side, meeting in one attention."""

    build: Build

    @nn.compact
    def __call__(
        self, streams: tuple[Array, Array], temb: Float[Array, "b d"], turns: Turns, bias: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        """(image [b,s,d], text [b,t,d]) → the same, one layer on."""
        x, text = streams
        m = Modulation(self.build, 6, name="norm1")(temb)
        c = Modulation(self.build, 6, name="norm1_context")(temb)
        image_in, text_in = modulated(layer_norm(x), m[0], m[1]), modulated(layer_norm(text), c[0], c[1])
        image_out, text_out = FluxAttention(self.build, name="attn")(image_in, text_in, turns, bias)
        assert text_out is not None
        x = x + m[2][:, None] * image_out
        feed = FeedForward(self.build, name="ff")
        x = x + m[5][:, None] * feed(modulated(layer_norm(x), m[3], m[4]))
        text = text + c[2][:, None] * text_out
        feed = FeedForward(self.build, name="ff_context")
        return (x, text + c[5][:, None] * feed(modulated(layer_norm(text), c[3], c[4]))), None


class SingleBlock(nn.Module):
    """Attention and feed-forward in parallel over all tokens, joined by one projection."""

    build: Build

    @nn.compact
    def __call__(
        self, x: Array, temb: Float[Array, "b d"], turns: Turns, bias: Array | None
    ) -> tuple[Array, None]:
        """[b,s,d] → the same, one layer on; attention comes first in the projection's input."""
        width = self.build.config.width
        shift, scale, gate = Modulation(self.build, 3, name="norm")(temb)
        normed = modulated(layer_norm(x), shift, scale)
        hidden = gelu(self.build.dense(4 * width, "proj_mlp")(normed))
        attended, _ = FluxAttention(self.build, name="attn")(normed, None, turns, bias)
        out = self.build.dense(width, "proj_out")(jnp.concatenate([attended, hidden], -1))
        return x + gate[:, None] * out, None


class Flux(nn.Module):
    """The velocity network of FLUX."""

    config: FluxConfig
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = FLUX_TARGETS
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
        guidance: Float[Array, " b"] | None = None,
        repeats: int = 1,
    ) -> Float[Array, "b h w c"]:
        """The velocity, float32. The last text token counts as `repeats` equal ones."""
        check_inputs(self.config, x, guidance)
        c, build = self.config, Build(self.config, self.lora, self.dtype, self.attention, self.at_use)
        (_, h, w, _), length = x.shape, tokens.shape[1]
        image = build.dense(c.width, "x_embedder")(pack(x))
        temb = TimeTextEmbed(build, name="time_text_embed")(t, pooled.astype(self.dtype), guidance)
        text = build.dense(c.width, "context_embedder")(tokens)
        turns = rotations(c, h // PATCH, w // PATCH, length)
        # Text comes first, so that the key of its last token is not the last key.
        bias = repeat_bias(length + image.shape[1], length - 1, repeats)
        if c.num_layers:
            layers = stack(DoubleBlock, c.num_layers, self.remat, shared=3)(build, name="double")
            (image, text), _ = layers((image, text), temb, turns, bias)
        joined = jnp.concatenate([text, image], 1)
        if c.num_single_layers:
            layers = stack(SingleBlock, c.num_single_layers, self.remat, shared=3)(build, name="single")
            joined, _ = layers(joined, temb, turns, bias)
        normed = continuous(build, joined[:, length:], temb, "norm_out")
        out = build.dense(c.in_channels, "proj_out", SMALL)(normed)
        return unpack(out, h, w).astype(jnp.float32)


def check_inputs(config: FluxConfig, x: Array, guidance: Array | None) -> None:
    """Latents of whole tokens; guidance where it is an input and nowhere else."""
    _, h, w, channels = x.shape
    if h % PATCH or w % PATCH or channels != config.latent_channels:
        raise UserError(
            f"latents: got {h}×{w}×{channels}, wanted multiples of {PATCH}, {config.latent_channels} channels"
        )
    if config.guidance_embeds and guidance is None:
        raise UserError("guidance: got none, wanted a number per image, since guidance_embeds is True")
    if guidance is not None and not config.guidance_embeds:
        raise UserError("guidance: got numbers, wanted none, since guidance_embeds is False")
