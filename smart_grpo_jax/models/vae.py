"""AutoencoderKL: images [b,H,W,3] in [-1,1] ⇄ latents [b,h,w,c], NHWC.

The latents of the policy are normalised, z = (mean - shift)·scale; `normalise` and `denormalise` do it.
Every 3×3 convolution is `lax.conv_general_dilated`: measured on CPU at 8 to 64 channels and 3 to 24
pixels it beats shifted matmuls and im2col by 1-8 times wherever the time goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import published
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.initializers import CONVOLUTION, ONES, ZEROS


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The fields of vae/config.json that decide the numbers, with diffusers' defaults."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VAEConfig:
        """Read vae/config.json; a feature that is not built is a UserError."""
        blocks = len(data.get("block_out_channels", (64,)))
        fixed = {
            "act_fn": ("silu",),
            "down_block_types": (("DownEncoderBlock2D",) * blocks,),
            "up_block_types": (("UpDecoderBlock2D",) * blocks,),
        }
        config = published.read(cls, data, fixed=fixed, ignored=("force_upcast",))
        for channels in config.block_out_channels:
            if channels % config.norm_num_groups:
                raise UserError(
                    f"VAEConfig.block_out_channels: got {channels}, "
                    f"wanted a multiple of norm_num_groups = {config.norm_num_groups}"
                )
        return config

    @property
    def factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class GroupNorm(nn.Module):
    """Group normalisation with float32 statistics.

    Sums run over the pixels of each channel first and over the channels of a group last: on CPU five
    times faster than one reduction over both, and normalisation was most of the decoder's time.
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """(x - mean)/√(var + 1e-6)·scale + bias, over the pixels and the channels of a group."""
        channels = x.shape[-1]
        scale = self.param("scale", ONES, (channels,))
        bias = self.param("bias", ZEROS, (channels,))
        x = x.astype(jnp.float32)
        x = x - self.group_mean(x)
        factor = scale.astype(jnp.float32) * jax.lax.rsqrt(self.group_mean(jnp.square(x)) + 1e-6)
        return (x * factor + bias.astype(jnp.float32)).astype(self.dtype)

    def group_mean(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
        """The mean over the pixels and the channels of a group, given to each of its channels."""
        means = x.mean((-3, -2), keepdims=True)
        size = x.shape[-1] // self.groups
        means = means.reshape(*means.shape[:-1], self.groups, size).mean(-1)
        return jnp.repeat(means, size, -1)


class Parts(nn.Module):
    """The layers that encoder and decoder share, by their published names."""

    config: VAEConfig
    dtype: Any

    def convolution(
        self, features: int, name: str, size: int = 3, stride: int = 1, padding: Any = "SAME"
    ) -> nn.Conv:
        """A convolution with bias, NHWC."""
        return nn.Conv(
            features,
            (size, size),
            strides=stride,
            padding=padding,
            dtype=self.dtype,
            name=name,
            kernel_init=CONVOLUTION,
            bias_init=ZEROS,
        )

    def normalisation(self, name: str) -> GroupNorm:
        """The group normalisation of this model."""
        return GroupNorm(self.config.norm_num_groups, self.dtype, name=name)


class Resnet(Parts):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 shortcut where the channels change."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        """One residual block."""
        h = self.convolution(self.features, "conv1")(nn.silu(self.normalisation("norm1")(x)))
        h = self.convolution(self.features, "conv2")(nn.silu(self.normalisation("norm2")(h)))
        if x.shape[-1] != self.features:
            x = self.convolution(self.features, "conv_shortcut", size=1)(x)
        return x + h


class PixelAttention(Parts):
    """Single-head self-attention over all pixels, residual."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x + to_out(attend(q, k, v)) of the normalised pixels."""
        b, h, w, c = x.shape
        tokens = self.normalisation("group_norm")(x).reshape(b, h * w, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=n)(tokens) for n in ("to_q", "to_k", "to_v"))
        out = attend(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
        return x + nn.Dense(c, dtype=self.dtype, name="to_out_0")(out).reshape(x.shape)


class MidBlock(Parts):
    """Resnet, attention, resnet at the lowest resolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The middle of encoder and decoder."""
        x = Resnet(self.config, self.dtype, x.shape[-1], name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = PixelAttention(self.config, self.dtype, name="attentions_0")(x)
        return Resnet(self.config, self.dtype, x.shape[-1], name="resnets_1")(x)


class Stage(Parts):
    """The resnets of one resolution, then one change of it: "down", "up" or "none"."""

    features: int
    resnets: int
    change: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W f"]:
        """One down_block or up_block."""
        for j in range(self.resnets):
            x = Resnet(self.config, self.dtype, self.features, name=f"resnets_{j}")(x)
        return {"down": self.down, "up": self.up, "none": lambda y: y}[self.change](x)

    def down(self, x: Array) -> Array:
        """Halve: zeros to the right and below only, then a strided convolution without padding."""
        return Resample(self.config, self.dtype, 2, ((0, 1), (0, 1)), name="downsamplers_0")(x)

    def up(self, x: Array) -> Array:
        """Double: nearest neighbour, then a convolution."""
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return Resample(self.config, self.dtype, 1, "SAME", name="upsamplers_0")(x)


class Resample(Parts):
    """The convolution of a change of resolution."""

    stride: int
    padding: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        """A 3×3 convolution that keeps the channels."""
        return self.convolution(x.shape[-1], "conv", stride=self.stride, padding=self.padding)(x)


class Encoder(Parts):
    """Images → [mean, logvar] before the quant convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w 2*c"]:
        """The walk down the resolutions."""
        c = self.config
        x = self.convolution(c.block_out_channels[0], "conv_in")(x)
        for i, features in enumerate(c.block_out_channels):
            change = "none" if i == len(c.block_out_channels) - 1 else "down"
            stage = Stage(c, self.dtype, features, c.layers_per_block, change, name=f"down_blocks_{i}")
            x = stage(x)
        x = MidBlock(c, self.dtype, name="mid_block")(x)
        return self.convolution(2 * c.latent_channels, "conv_out")(
            nn.silu(self.normalisation("conv_norm_out")(x))
        )


class Decoder(Parts):
    """Latents after the post-quant convolution → images."""

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """The walk up the resolutions; one resnet more per stage than the encoder."""
        c = self.config
        x = self.convolution(c.block_out_channels[-1], "conv_in")(z)
        x = MidBlock(c, self.dtype, name="mid_block")(x)
        for i, features in enumerate(reversed(c.block_out_channels)):
            change = "none" if i == len(c.block_out_channels) - 1 else "up"
            stage = Stage(c, self.dtype, features, c.layers_per_block + 1, change, name=f"up_blocks_{i}")
            x = stage(x)
        return self.convolution(c.out_channels, "conv_out")(nn.silu(self.normalisation("conv_norm_out")(x)))


class AutoencoderKL(nn.Module):
    """The variational autoencoder; `apply(variables, x, method="encode" | "decode")`."""

    config: VAEConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Name the parts as in the published files."""
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        if c.use_quant_conv:
            self.quant_conv = nn.Conv(2 * c.latent_channels, (1, 1), dtype=self.dtype)
        if c.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(c.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, x: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Images in [-1,1] → mean and log-variance (clamped to [-30, 20]) of raw latents, float32."""
        h = self.encoder(x.astype(self.dtype))
        h = self.quant_conv(h) if self.config.use_quant_conv else h
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Raw latents → images, about [-1,1] and not clipped, float32."""
        z = z.astype(self.dtype)
        z = self.post_quant_conv(z) if self.config.use_post_quant_conv else z
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """Reconstruction through the mean; touches every parameter, so `init` uses it."""
        return self.decode(self.encode(x)[0])


def normalise(config: VAEConfig, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Raw latents → the latents of the policy: (z - shift)·scale."""
    return (z - (config.shift_factor or 0.0)) * config.scaling_factor


def denormalise(config: VAEConfig, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The latents of the policy → raw latents: x/scale + shift."""
    return x / config.scaling_factor + (config.shift_factor or 0.0)
