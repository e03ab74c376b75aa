"""The pure functions of a pipeline: velocity, guidance, decoder, encoder, sampler.

Training takes these; they get their parameters as arguments. Equal arguments give the same function, so
that programs compiled for it are found again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Conditioning, DecodeFn, PyTree, VelocityFn
from smart_grpo_jax.hub import sharding
from smart_grpo_jax.models import tiling
from smart_grpo_jax.models.flux import Flux, FluxConfig
from smart_grpo_jax.models.lora import FLUX_TARGETS, SD3_TARGETS
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig, denormalise, normalise

TransformerConfig = MMDiTConfig | FluxConfig

NETWORKS: Mapping[type, type[nn.Module]] = {MMDiTConfig: MMDiT, FluxConfig: Flux}
TARGETS: Mapping[type, tuple[str, ...]] = {MMDiTConfig: SD3_TARGETS, FluxConfig: FLUX_TARGETS}


class RawVelocity(Protocol):
    """The bare network; `guidance` only where the network takes it as an input."""

    def __call__(
        self, params: PyTree, x: Array, t: Array, cond: Conditioning, guidance: Any = None, /
    ) -> Array:
        """v[b,h,w,c]."""
        ...


@functools.cache
def velocity_fn(
    config: TransformerConfig,
    *,
    rank: int = 0,
    alpha: float = 0.0,
    targets: tuple[str, ...] = (),
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: str = "xla",
) -> RawVelocity:
    """The raw network; reads params["params"] and, with a rank, params["lora"]. No targets: the published."""
    options = {"dtype": dtype, "remat": remat, "attention": attention}
    net = network(config, rank=rank, alpha=alpha, targets=targets, **options)

    def velocity(params: PyTree, x: Array, t: Array, cond: Conditioning, guidance: Any = None, /) -> Array:
        variables = {"params": params["params"], "lora": params["lora"] if rank else {}}
        extra = {}
        if config.embeds_guidance:
            if guidance is None:
                raise UserError(
                    "velocity: got no guidance, wanted a number: this network takes it as an input"
                )
            extra["guidance"] = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), t.shape)
        v = net.apply(variables, x, t, cond.tokens, cond.pooled, repeats=cond.repeats, **extra)
        return cast(Array, v)

    return velocity


def network(
    config: TransformerConfig, *, rank: int, alpha: float, targets: tuple[str, ...], **options: Any
) -> Any:
    """The Linen module of a transformer's config."""
    kind = type(config)
    adapters = {"lora_rank": rank, "lora_alpha": alpha, "lora_targets": targets or TARGETS[kind]}
    return NETWORKS[kind](**{"config": config, "at_use": sharding.at_use(kind), **adapters, **options})


def guided(velocity: VelocityFn, scale: float | Array) -> VelocityFn:
    """v_n + scale·(v_p - v_n), the batch doubled: row by row a negative and a positive call, so that the two
    stay on the device of their image.

    The negative prompt is params["negative"], a Conditioning of one row, unless the rows carry their own.
    As in diffusers, a scale of 1 or less means no guidance; the batch is then not doubled.
    """
    if isinstance(scale, (int, float)) and scale <= 1:
        return velocity

    def both(params: PyTree, x: Array, t: Array, cond: Conditioning) -> Array:
        negative = params["negative"] if cond.negative is None else cond.negative
        cond = dataclasses.replace(cond, negative=None)
        if negative.repeats != cond.repeats or negative.tokens.shape[-2:] != cond.tokens.shape[-2:]:
            raise UserError("guidance: the negative prompt is encoded unlike the prompts (compact or not?)")

        def double(n: Array, p: Array) -> Array:
            pairs = jnp.stack([jnp.broadcast_to(n, p.shape).astype(p.dtype), p], 1)
            return pairs.reshape(-1, *p.shape[1:])

        v = velocity(params, double(x, x), double(t, t), jax.tree.map(double, negative, cond))
        v = v.reshape(-1, 2, *v.shape[1:])
        without, with_prompt = v[:, 0], v[:, 1]
        return without + scale * (with_prompt - without)

    return both


def embedded(velocity: RawVelocity, scale: float | Array) -> VelocityFn:
    """The network with its guidance input set: one call, no negative prompt."""
    return lambda params, x, t, cond: velocity(params, x, t, cond, scale)


@functools.cache
def decode_fn(config: VAEConfig, tiled: bool = False) -> DecodeFn:
    """Normalised latents → images in [0,1]; params are the VAE's. Always float32."""
    vae = AutoencoderKL(config)

    def decode(params: PyTree, x0: Array) -> Array:
        raw = lambda z: cast(Array, vae.apply({"params": params}, z, method="decode"))
        z = denormalise(config, x0.astype(jnp.float32))
        x = tiling.decode(raw, z, config) if tiled else raw(z)
        return jnp.clip(x / 2 + 0.5, 0.0, 1.0)

    return decode


@functools.cache
def encode_images_fn(config: VAEConfig, tiled: bool = False) -> DecodeFn:
    """Images in [0,1] → normalised latents (the mean); params are the VAE's."""
    vae = AutoencoderKL(config)

    def encode(params: PyTree, images: Array) -> Array:
        mean = lambda x: cast(tuple[Array, Array], vae.apply({"params": params}, x, method="encode"))[0]
        x = images * 2 - 1
        return normalise(config, tiling.encode(mean, x, config) if tiled else mean(x))

    return encode


compiled = functools.cache(jax.jit)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_sampler(
    policy: VelocityFn,
    decode: DecodeFn,
    params: PyTree,
    x: Float[Array, "b h w c"],
    times: Float[Array, " n"],
    cond: Conditioning,
) -> Float[Array, "b H W 3"]:
    """Euler, x ← x + v·(t' - t), along all times; then the images."""

    def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        t, t_next = pair
        v = policy(params["policy"], x, jnp.broadcast_to(t, x.shape[:1]), cond)
        return x + v * (t_next - t), None

    x, _ = jax.lax.scan(step, x, (times[:-1], times[1:]))
    return decode(params["vae"], x)


@functools.cache
def sampling_policy(velocity: RawVelocity, kind: str) -> VelocityFn:
    """The policy whose scale is params["guidance"], traced: another scale is no new program."""

    def policy(params: PyTree, x: Array, t: Array, cond: Conditioning) -> Array:
        return GUIDANCE[kind](velocity, params["guidance"])(params, x, t, cond)

    return policy


GUIDANCE: Mapping[str, Any] = {
    "doubled": guided,
    "embedded": embedded,
    "none": lambda velocity, scale: velocity,
}
"""How guidance enters: a second, unconditional call; an input of the network; not at all."""
