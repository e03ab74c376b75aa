"""How time, guidance and pooled text enter the transformers, and latents the one of SD3."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models.initializers import LECUN, SMALL, ZEROS
from smart_grpo_jax.models.layers import Build


class Embedding(nn.Module):
    """Linear, SiLU, linear."""

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b n"]) -> Float[Array, "b d"]:
        """A vector for the whole image."""
        width = self.build.config.width
        h = nn.silu(self.build.dense(width, "linear_1", SMALL)(x))
        return self.build.dense(width, "linear_2", SMALL)(h)


class TimeTextEmbed(nn.Module):
    """The vector that modulates every layer: time, guidance where it is an input, pooled text."""

    build: Build

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], pooled: Float[Array, "b p"], guidance: Float[Array, " b"] | None = None
    ) -> Float[Array, "b d"]:
        """MLP(sinusoid(1000 t)) [+ MLP(sinusoid(1000 guidance))] + MLP(pooled)."""
        out = Embedding(self.build, name="timestep_embedder")(sinusoid(1000.0 * t.astype(jnp.float32)))
        if guidance is not None:
            # At 1000·guidance the last bit of a frequency moves the velocity by 2e-5.
            wave = sinusoid(1000.0 * guidance.astype(jnp.float32), PUBLISHED)
            out = out + Embedding(self.build, name="guidance_embedder")(wave)
        return out + Embedding(self.build, name="text_embedder")(pooled)


def nearest_frequencies() -> np.ndarray:
    """10000^(-i/128), i < 128, the float32 nearest to the exponential of a float32 exponent."""
    # The exponent is rounded to float32 as in the published code: at t = 1000 the difference is visible.
    exponents = np.float32(-np.log(10000.0)) * np.arange(128, dtype=np.float32) / np.float32(128)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def published_frequencies() -> np.ndarray:
    """The same with the float32 exponential of PyTorch, which is one unit too large in three places."""
    frequencies = nearest_frequencies()
    frequencies[[13, 44, 119]] = np.nextafter(frequencies[[13, 44, 119]], np.float32(1))
    return frequencies


NEAREST, PUBLISHED = nearest_frequencies(), published_frequencies()


def sinusoid(t: Float[Array, " b"], frequencies: np.ndarray = NEAREST) -> Float[Array, "b 256"]:
    """[cos(t f_i), sin(t f_i)], float32."""
    angles = t[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class PatchEmbed(nn.Module):
    """Patches of p×p latents → tokens, plus the stored table of positions.

    The table belongs to the file, not to what is learned: it is kept in 'params', and no gradient
    reaches it.
    """

    build: Build

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b s d"]:
        """Row-major tokens; the table is cropped around its centre."""
        c, (b, h, w, _) = self.build.config, x.shape
        p, size = c.patch_size, c.pos_embed_max_size
        rows, columns = h // p, w // p
        if h % p or w % p or max(rows, columns) > size:
            raise UserError(f"latents: got {h}×{w}, wanted multiples of {p} and at most {size * p}")
        table = self.param("pos_embed", lambda _: position_table(c))
        table = jax.lax.stop_gradient(table).astype(jnp.float32).reshape(size, size, c.width)
        top, left = (size - rows) // 2, (size - columns) // 2
        table = table[top : top + rows, left : left + columns].reshape(1, rows * columns, c.width)
        table = self.build.at_use("/".join((*self.path, "pos_embed")), table)
        patches = x.reshape(b, rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5)
        tokens = PatchKernel(self.build, name="proj")(patches.reshape(b, rows * columns, -1))
        return (tokens + table).astype(self.build.dtype)


class PatchKernel(nn.Module):
    """The published p×p convolution with stride p, as one matmul over flattened patches."""

    build: Build

    @nn.compact
    def __call__(self, patches: Float[Array, "b s n"]) -> Float[Array, "b s d"]:
        """Features of a patch are ordered (row, column, channel), as in an HWIO kernel."""
        c, dtype = self.build.config, self.build.dtype
        shape = (c.patch_size, c.patch_size, c.in_channels, c.width)
        kernel = self.param("kernel", LECUN, shape).astype(dtype)
        bias = self.param("bias", ZEROS, (c.width,)).astype(dtype)
        return patches.astype(dtype) @ kernel.reshape(-1, c.width) + bias


def position_table(config: Any) -> Float[Array, "1 n d"]:
    """The sine-cosine table of a network trained from scratch: columns in the first half of the
    features, rows in the second, each as all sines then all cosines."""
    size, width = config.pos_embed_max_size, config.width
    positions = np.arange(size, dtype=np.float64) / (size / (config.sample_size // config.patch_size))
    angles = positions[:, None] * 10000.0 ** (-np.arange(width // 4) / (width / 4.0))
    # The waves are small and made on the host in float64; the table is gigabytes for real sizes, and is
    # left to jax, so that asking for its shape costs nothing.
    wave = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)
    half = (size, size, wave.shape[-1])
    table = jnp.concatenate([jnp.broadcast_to(wave[None], half), jnp.broadcast_to(wave[:, None], half)], -1)
    return table.reshape(1, size * size, -1)
