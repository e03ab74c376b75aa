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
from smart_grpo_jax.models.embeddings import Embedding, sinusoid
from smart_grpo_jax.models.initializers import SMALL
from smart_grpo_jax.models.lora import FLUX_TARGETS, LoRA
from smart_grpo_jax.models.mmdit import (
    REMAT,
    Build,
    FeedForward,
    HeadNorm,
    Modulation,
    layer_norm,
    modulated,
)

PATCH = 2
"""Latents per token along a side; the published `patch_size` of 1 counts packed latents."""


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
        return published.read(cls, data, fixed={"patch_size": (1,)}, ignored=())

    def __post_init__(self) -> None:
        if self.in_channels % PATCH**2 or self.out_channels not in (None, self.in_channels):
            raise UserError(
                f"FluxConfig.in_channels: got {self.in_channels} in, {self.out_channels} out, "
                f"wanted equal multiples of {PATCH**2}"
            )
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(d % 2 for d in axes) or sum(axes) != self.attention_head_dim:
            raise UserError(
                f"FluxConfig.axes_dims_rope: got {axes}, wanted three even numbers with the sum "
                f"attention_head_dim = {self.attention_head_dim}"
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


class Guide(nn.Module):
    """The vector that modulates every layer: time, guidance where it is an input, pooled text."""

    build: Any

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], guidance: Float[Array, " b"] | None, pooled: Float[Array, "b p"]
    ) -> Float[Array, "b d"]:
        """MLP(sinusoid(1000 t)) + MLP(sinusoid(1000 g)) + MLP(pooled)."""
        wave = lambda a: sinusoid(1000.0 * a.astype(jnp.float32))
        out = Embedding(self.build, name="timestep_embedder")(wave(t))
        if guidance is not None:
            out = out + Embedding(self.build, name="guidance_embedder")(wave(guidance))
        return out + Embedding(self.build, name="text_embedder")(pooled)


class FluxAttention(nn.Module):
    """Attention over [text, image] tokens; `joint` has weights of its own for the text."""

    build: Build
    joint: bool

    def heads(self, x: Array, prefix: str, suffix: str, norms: str) -> tuple[Array, Array, Array]:
        """Queries, keys and values [b,s,h,d]; queries and keys normalised."""
        c = self.build.config
        shape = (*x.shape[:-1], c.num_attention_heads, c.attention_head_dim)
        q, k, v = (self.build.dense(c.width, f"{prefix}_{n}{suffix}")(x).reshape(shape) for n in "qkv")
        return HeadNorm(name=f"{norms}_q")(q), HeadNorm(name=f"{norms}_k")(k), v

    @nn.compact
    def __call__(
        self, x: Array, text: Array | None, turns: Turns, bias: Array | None
    ) -> tuple[Array, Array | None]:
        """The attended image and text; without `joint`, x holds both and comes back before any projection."""
        width = self.build.config.width
        q, k, v = self.heads(x, "to", "", "norm")
        if text is not None:
            added = self.heads(text, "add", "_proj", "norm_added")
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
        image_out, text_out = FluxAttention(self.build, True, name="attn")(image_in, text_in, turns, bias)
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
        hidden = nn.gelu(self.build.dense(4 * width, "proj_mlp")(normed), approximate=True)
        attended, _ = FluxAttention(self.build, False, name="attn")(normed, None, turns, bias)
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
        c = self.config
        build = Build(c, LoRA(self.lora_rank, self.lora_alpha, self.lora_targets), self.dtype, self.attention)
        b, h, w, channels = x.shape
        if h % PATCH or w % PATCH:
            raise UserError(f"latents: got {h}×{w}, wanted multiples of {PATCH}")
        if (guidance is None) == c.guidance_embeds:
            wanted = "a number" if c.guidance_embeds else "none"
            raise UserError(f"guidance: wanted {wanted}, since guidance_embeds is {c.guidance_embeds}")
        rows, columns = h // PATCH, w // PATCH
        packed = x.reshape(b, rows, PATCH, columns, PATCH, channels).transpose(0, 1, 3, 5, 2, 4)
        image = build.dense(c.width, "x_embedder")(packed.reshape(b, rows * columns, -1))
        temb = Guide(build, name="time_text_embed")(t, guidance, pooled.astype(self.dtype))
        text = build.dense(c.width, "context_embedder")(tokens)
        turns = rotations(c, rows, columns, text.shape[1])
        bias = repeat_bias(text.shape[1], image.shape[1], repeats)
        if c.num_layers:
            double = self.stack(DoubleBlock, c.num_layers)(build, name="double")
            (image, text), _ = double((image, text), temb, turns, bias)
        length, joined = text.shape[1], jnp.concatenate([text, image], 1)
        if c.num_single_layers:
            single = self.stack(SingleBlock, c.num_single_layers)(build, name="single")
            joined, _ = single(joined, temb, turns, bias)
        scale, shift = Modulation(build, 2, name="norm_out")(temb)
        out = build.dense(c.in_channels, "proj_out", SMALL)(
            modulated(layer_norm(joined[:, length:]), shift, scale)
        )
        out = out.reshape(b, rows, columns, channels, PATCH, PATCH).transpose(0, 1, 4, 2, 5, 3)
        return out.reshape(b, h, w, channels).astype(jnp.float32)

    def stack(self, block: Any, length: int) -> Any:
        """The block class scanned over `length` layers, with the rematerialisation asked for."""
        if self.remat != "none":
            block = nn.remat(block, prevent_cse=False, policy=REMAT[self.remat])
        return nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 3,  # pyright: ignore[reportArgumentType] (flax says int)
            length=length,
        )


def repeat_bias(text: int, image: int, repeats: int) -> Float[Array, "1 1 1 s"] | None:
    """log(repeats) on the logit of the last text key."""
    if repeats == 1:
        return None
    return jnp.zeros((1, 1, 1, text + image)).at[..., text - 1].set(np.log(repeats))
