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
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models import published
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.embeddings import PatchEmbed, TimeTextEmbed
from smart_grpo_jax.models.initializers import ONES, SMALL, XAVIER
from smart_grpo_jax.models.lora import SD3_TARGETS, LoRA, LoRADense


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


@dataclasses.dataclass(frozen=True)
class Build:
    """What all parts of one network share: config, adapters, compute dtype, attention."""

    config: MMDiTConfig
    lora: LoRA
    dtype: Any
    attention: str

    def dense(self, features: int, name: str, kernel_init: Any = XAVIER) -> LoRADense:
        """A linear layer of the network."""
        return LoRADense(features, self.lora, dtype=self.dtype, kernel_init=kernel_init, name=name)


def layer_norm(x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
    """(x - mean)/√(var + 1e-6) with float32 statistics and no affine part."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulated(x: Float[Array, "b s d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Array:
    """x·(1 + scale) + shift, the same for all tokens."""
    return x * (1 + scale[:, None]) + shift[:, None]


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


class Projection(nn.Module):
    """`proj` of the published feed-forward: a linear layer and the tanh-GELU."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s 4*d"]:
        """gelu(W x)."""
        return nn.gelu(self.build.dense(4 * self.build.config.width, "proj")(x), approximate=True)


class FeedForward(nn.Module):
    """Linear to 4·width, tanh-GELU, linear back."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The token-wise half of a block."""
        return self.build.dense(self.build.config.width, "net_2")(Projection(self.build, name="net_0")(x))


class Attention(nn.Module):
    """Attention over image tokens, followed by text tokens where there are any."""

    build: Build
    drops_text: bool = False

    def heads(self, x: Array, prefix: str, suffix: str, norms: str) -> tuple[Array, Array, Array]:
        """Queries, keys and values [b,s,h,d]; queries and keys normalised where the config says so."""
        c = self.build.config
        shape = (*x.shape[:-1], c.num_attention_heads, c.attention_head_dim)
        q, k, v = (self.build.dense(c.width, f"{prefix}_{n}{suffix}")(x).reshape(shape) for n in "qkv")
        if c.qk_norm:
            q, k = HeadNorm(name=f"{norms}_q")(q), HeadNorm(name=f"{norms}_k")(k)
        return q, k, v

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s d"], text: Float[Array, "b t d"] | None = None, bias: Array | None = None
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b t d"] | None]:
        """The attended image, and the attended text unless there is none or it is dropped."""
        width, length = self.build.config.width, x.shape[1]
        q, k, v = self.heads(x, "to", "", "norm")
        if text is not None:
            added = self.heads(text, "add", "_proj", "norm_added")
            k, v = jnp.concatenate([k, added[1]], 1), jnp.concatenate([v, added[2]], 1)
            if not self.drops_text:  # the published last block computes text queries and throws them away
                q = jnp.concatenate([q, added[0]], 1)
        out = attend(q, k, v, bias, self.build.attention)
        out = out.reshape(*out.shape[:2], width)
        image = self.build.dense(width, "to_out_0")(out[:, :length])
        if text is None or self.drops_text:
            return image, None
        return image, self.build.dense(width, "to_add_out")(out[:, length:])


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
        if self.last:  # AdaLN-continuous: scale before shift
            scale, shift = Modulation(self.build, 2, name="norm1_context")(temb)
            text_in = modulated(layer_norm(text), shift, scale)
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


REMAT: Mapping[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class MMDiT(nn.Module):
    """The velocity network: v = x1 - x0 predicted from x_t, t and the text."""

    config: MMDiTConfig
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = SD3_TARGETS
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"

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
        c, build = self.config, Build(self.config, self.lora, self.dtype, self.attention)
        b, h, w, _ = x.shape
        image = PatchEmbed(build, name="pos_embed")(x.astype(self.dtype))
        temb = TimeTextEmbed(build, name="time_text_embed")(t, pooled.astype(self.dtype))
        text = build.dense(c.width, "context_embedder")(tokens)
        bias = repeat_bias(image.shape[1], text.shape[1], repeats)
        streams = (image, text)
        for name, length, dual in c.stacks():
            streams, _ = self.stack(length)(build, dual, name == "last", name=name)(streams, temb, bias)
        scale, shift = Modulation(build, 2, name="norm_out")(temb)
        out = build.dense(c.patch_size**2 * c.channels, "proj_out", SMALL)(
            modulated(layer_norm(streams[0]), shift, scale)
        )
        p = c.patch_size
        out = out.reshape(b, h // p, w // p, p, p, c.channels).transpose(0, 1, 3, 2, 4, 5)
        return out.reshape(b, h, w, c.channels).astype(jnp.float32)

    def stack(self, length: int) -> Any:
        """The block class scanned over `length` layers, with the rematerialisation asked for."""
        if self.remat not in REMAT:
            raise UserError(f"memory.remat: got {self.remat!r}, {nearest(self.remat, REMAT)}")
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        return nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] (flax says int)
            length=length,
        )


def repeat_bias(image: int, text: int, repeats: int) -> Float[Array, "1 1 1 s"] | None:
    """log(repeats) on the logit of the last key: n equal keys weigh n·exp(logit) = exp(logit + log n)."""
    if repeats == 1:
        return None
    return jnp.zeros((1, 1, 1, image + text)).at[..., -1].set(np.log(repeats))
