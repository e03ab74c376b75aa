"""A diffusers folder as a `Pipeline`: prompts → conditioning → velocity → latents → images.

Methods are for people; training takes the pure forms, which get their parameters as arguments:
`velocity_fn`, `guided`, `decode_fn`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import Conditioning, DecodeFn, PyTree, VelocityFn
from smart_grpo_jax.hub import adapters, folder
from smart_grpo_jax.hub.folder import save_pipeline as save_pipeline
from smart_grpo_jax.hub.tokenizers import Tokenizer, load_tokenizer, read_json
from smart_grpo_jax.maths import schedule
from smart_grpo_jax.models.clip import CLIPConfig, CLIPOutput, CLIPText
from smart_grpo_jax.models.lora import SD3_TARGETS, LoRA
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig, denormalise, normalise
from smart_grpo_jax.worlds import shapes

DTYPES: Mapping[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

BATCH = 64
"""Prompts encoded at once; smaller calls are filled up to a power of two, so that few programs exist."""


@functools.cache
def velocity_fn(
    config: MMDiTConfig,
    *,
    rank: int = 0,
    alpha: float = 0.0,
    targets: tuple[str, ...] = SD3_TARGETS,
    dtype: Any = jnp.float32,
    remat: str = "none",
) -> VelocityFn:
    """The raw network; reads params["params"] and, with a rank, params["lora"].

    Equal arguments give the same function, so that programs compiled for it are found again.
    """
    net = MMDiT(config, rank, alpha, targets, dtype=dtype, remat=remat)

    def velocity(params: PyTree, x: Array, t: Array, cond: Conditioning) -> Array:
        variables = {"params": params["params"], "lora": params["lora"] if rank else {}}
        return cast(Array, net.apply(variables, x, t, cond.tokens, cond.pooled, repeats=cond.repeats))

    return velocity


def guided(velocity: VelocityFn, scale: float | Array) -> VelocityFn:
    """v_n + scale·(v_p - v_n), the batch doubled as [negative, positive].

    The negative prompt is params["negative"], a Conditioning of one row. As in diffusers, a scale of 1 or
    less means no guidance; the batch is then not doubled.
    """
    if isinstance(scale, (int, float)) and scale <= 1:
        return velocity

    def both(params: PyTree, x: Array, t: Array, cond: Conditioning) -> Array:
        negative = params["negative"]
        if negative.repeats != cond.repeats or negative.tokens.shape[-2:] != cond.tokens.shape[-2:]:
            raise UserError("guidance: the negative prompt is encoded unlike the prompts (compact or not?)")

        def double(n: Array, p: Array) -> Array:
            return jnp.concatenate([jnp.broadcast_to(n, p.shape).astype(p.dtype), p])

        v = velocity(params, double(x, x), double(t, t), jax.tree.map(double, negative, cond))
        without, with_prompt = jnp.split(v, 2)
        return without + scale * (with_prompt - without)

    return both


@functools.cache
def decode_fn(config: VAEConfig, dtype: Any = jnp.float32) -> DecodeFn:
    """Normalised latents → images in [0,1]; params are the VAE's."""
    vae = AutoencoderKL(config, dtype)

    def decode(params: PyTree, x0: Array) -> Array:
        x = vae.apply({"params": params}, denormalise(config, x0.astype(jnp.float32)), method="decode")
        return jnp.clip(cast(Array, x) / 2 + 0.5, 0.0, 1.0)

    return decode


@functools.cache
def encode_images_fn(config: VAEConfig) -> DecodeFn:
    """Images in [0,1] → normalised latents (the mean); params are the VAE's."""
    vae = AutoencoderKL(config)

    def encode(params: PyTree, images: Array) -> Array:
        return normalise(config, vae.apply({"params": params}, images * 2 - 1, method="encode")[0])

    return encode


compiled = functools.cache(jax.jit)


@functools.partial(jax.jit, static_argnums=(0, 1))
def text_states(
    configs: tuple[CLIPConfig, CLIPConfig],
    dtype: Any,
    params: tuple[PyTree, PyTree],
    ids: tuple[Int[Array, "b s"], Int[Array, "b s"]],
) -> tuple[Float[Array, "b s d"], Float[Array, "b p"]]:
    """Both encoders side by side: penultimate states and pooled vectors, joined along the features."""
    outs = [
        cast(CLIPOutput, CLIPText(config, dtype).apply({"params": p}, one))
        for config, p, one in zip(configs, params, ids, strict=True)
    ]
    states = jnp.concatenate([o.penultimate for o in outs], -1)
    return states, jnp.concatenate([o.pooled for o in outs], -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run_sampler(
    velocity: VelocityFn,
    decode: DecodeFn,
    use_guidance: bool,
    params: PyTree,
    x: Float[Array, "b h w c"],
    times: Float[Array, " n"],
    cond: Conditioning,
    guidance: Float[Array, ""],
) -> Float[Array, "b H W 3"]:
    """Euler, x ← x + v·(t' - t), along all times; then the images."""
    policy = guided(velocity, guidance) if use_guidance else velocity

    def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        t, t_next = pair
        v = policy(params["policy"], x, jnp.broadcast_to(t, x.shape[:1]), cond)
        return x + v * (t_next - t), None

    x, _ = jax.lax.scan(step, x, (times[:-1], times[1:]))
    return decode(params["vae"], x)


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded text-to-image model. `params` has one tree per network, by its published name."""

    transformer: MMDiTConfig
    vae: VAEConfig
    text_encoders: tuple[CLIPConfig, CLIPConfig]
    tokenizers: tuple[Tokenizer, Tokenizer]
    scheduler: Mapping[str, Any]
    params: Mapping[str, PyTree]
    dtype: Any
    t5_length: int

    @property
    def patch_size(self) -> int:
        """Latents per image token, along one side."""
        return self.transformer.patch_size

    @property
    def shift(self) -> float:
        """The scheduler's time shift; e^mu at the default size where it is dynamic."""
        return self._shift(self.latent_shape())

    def _shift(self, shape: tuple[int, ...]) -> float:
        s = self.scheduler
        if not s.get("use_dynamic_shifting", False):
            return float(s.get("shift", 1.0))
        low, high = s.get("base_image_seq_len", 256), s.get("max_image_seq_len", 4096)
        start, stop = s.get("base_shift", 0.5), s.get("max_shift", 1.15)
        tokens = shape[0] * shape[1] // self.patch_size**2
        return math.exp(start + (stop - start) * (tokens - low) / (high - low))

    def times(self, num_steps: int, size: int | tuple[int, int] | None = None) -> np.ndarray:
        """The scheduler's own grid 1 … 0, one value more than steps."""
        shift = self._shift(self.latent_shape(size))
        if not self.scheduler.get("use_dynamic_shifting", False):
            return schedule.sd3(num_steps, shift)
        raw = np.linspace(1.0, 1 / schedule.TRAIN_STEPS, num_steps)  # dynamic: shifted once, by e^mu
        return np.append(schedule.shift(raw, shift), 0.0).astype(np.float32)

    def latent_shape(self, size: int | tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image of `size` pixels; by default the model's own size."""
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        if not height:
            height = width = self.transformer.sample_size * self.vae.factor
        step, limit = self.vae.factor * self.patch_size, self.transformer.pos_embed_max_size
        for side in (height, width):
            if side < step or side % step or side // step > limit:
                raise UserError(
                    f"size: got {height}x{width}, wanted multiples of {step} pixels, at most {limit * step}"
                )
        return height // self.vae.factor, width // self.vae.factor, self.transformer.in_channels

    def encode(self, prompts: Sequence[str], compact: bool = False) -> Conditioning:
        """Prompts → one row each: CLIP tokens, then the zeros that stand for an absent T5.

        With `compact` one zero token stands for all of them (`Conditioning.repeats`).
        """
        if isinstance(prompts, str):
            raise UserError("encode: got one string, wanted a list of prompts")
        if not prompts:
            raise UserError("encode: got no prompt")
        parts = [self._encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        states, pooled = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        zeros = min(self.t5_length, 1) if compact else self.t5_length
        wide = self.transformer.joint_attention_dim - states.shape[-1]
        tokens = jnp.pad(states, ((0, 0), (0, zeros), (0, wide)))
        return Conditioning(tokens, pooled, max(self.t5_length, 1) if compact else 1)

    def _encode(self, prompts: Sequence[str]) -> tuple[Array, Array]:
        """At most BATCH prompts through both encoders, the batch filled up to a power of two."""
        rows = 1 << (len(prompts) - 1).bit_length()
        filled = [*prompts, *[""] * (rows - len(prompts))]
        ids = tuple(jnp.asarray(tokenizer(filled)) for tokenizer in self.tokenizers)
        params = (self.params["text_encoder"], self.params["text_encoder_2"])
        states, pooled = text_states(self.text_encoders, self.dtype, params, ids)
        return states[: len(prompts)], pooled[: len(prompts)]

    def velocity_fn(
        self, rank: int = 0, alpha: float = 0.0, targets: Sequence[str] = SD3_TARGETS, remat: str = "none"
    ) -> VelocityFn:
        """The raw network as a pure function of {"params": …, "lora": …}."""
        return velocity_fn(
            self.transformer, rank=rank, alpha=alpha, targets=tuple(targets), dtype=self.dtype, remat=remat
        )

    def decode_fn(self) -> DecodeFn:
        """The decoder as a pure function of the VAE's parameters; float32, as all GRPO codes run it."""
        return decode_fn(self.vae)

    def adapter(self, rank: int, alpha: float, targets: Sequence[str] = SD3_TARGETS) -> tuple[Any, ...]:
        """What `lora.init_lora(key, *adapter)` takes: the network, its adapters, inputs as shapes."""
        c = self.transformer
        shapes = (
            (1, *self.latent_shape()),
            (1,),
            (1, 1, c.joint_attention_dim),
            (1, c.pooled_projection_dim),
        )
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return MMDiT(c, rank, alpha, tuple(targets)), LoRA(rank, alpha, tuple(targets)), *inputs

    def velocity(self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Conditioning) -> Array:
        """The raw network, without guidance."""
        return compiled(self.velocity_fn())({"params": self.params["transformer"]}, x, t, cond)

    def decode(self, x0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Latents → images in [0,1]."""
        return compiled(self.decode_fn())(self.params["vae"], x0)

    def encode_images(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Images in [0,1] → latents (the mean)."""
        return compiled(encode_images_fn(self.vae))(self.params["vae"], images)

    def sample(
        self,
        prompts: Sequence[str],
        key: Array | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        num_steps: int = 28,
        guidance: float = 4.5,
        negative: str | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Images of the prompts. Noise: `latents`, or drawn from `key` (default: key 0)."""
        if latents is None:
            key = jax.random.key(0) if key is None else key
            latents = jax.random.normal(key, (len(prompts), *self.latent_shape(size)))
        else:
            size = (latents.shape[1] * self.vae.factor, latents.shape[2] * self.vae.factor)
        if len(latents) != len(prompts):
            raise UserError(f"sample: got {len(latents)} latents for {len(prompts)} prompts")
        policy = {
            "params": self.params["transformer"],
            "negative": self.encode([negative or ""], compact=True),
        }
        return run_sampler(
            self.velocity_fn(),
            self.decode_fn(),
            guidance > 1,
            {"policy": policy, "vae": self.params["vae"]},
            jnp.asarray(latents, jnp.float32),
            jnp.asarray(self.times(num_steps, size)),
            self.encode(prompts, compact=True),
            jnp.float32(guidance),
        )


def pipeline_folder(path: str | Path) -> Path:
    """Where a pipeline lies: "shapes" is the one inside this package."""
    return Path(shapes.__file__).parent / "pipeline" if str(path) == "shapes" else Path(path)


def load_pipeline(
    path: str | Path,
    dtype: str = "float32",
    lora: str | Path | None = None,
    t5_length: int = 256,
) -> Pipeline:
    """Load a diffusers folder, or "shapes", the embedded world.

    The networks compute in `dtype`, the VAE always in float32. `lora` is a file or folder of adapters in
    the diffusers format, folded into the weights. `t5_length` is how many zero tokens stand for an
    absent T5 (diffusers: 256).
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: got {dtype!r}, {nearest(dtype, DTYPES)}")
    root = pipeline_folder(path)
    classes = folder.components(root)
    configs = {name: folder.read_config(root, name, kind) for name, kind in classes.items()}
    params = {}
    for name, kind in classes.items():
        kept = jnp.float32 if name == "vae" else DTYPES[dtype]
        params[name] = folder.read_params(root, name, kind, configs[name], kept)
    if lora is not None:
        params["transformer"] = adapters.fold(Path(lora), configs["transformer"], params["transformer"])
    first = load_tokenizer(root / "tokenizer")
    second = load_tokenizer(root / "tokenizer_2", first.length)  # diffusers takes the first one's length
    return Pipeline(
        transformer=configs["transformer"],
        vae=configs["vae"],
        text_encoders=(configs["text_encoder"], configs["text_encoder_2"]),
        tokenizers=(first, second),
        scheduler=read_json(root / "scheduler", "scheduler_config.json"),
        params=params,
        dtype=DTYPES[dtype],
        t5_length=t5_length,
    )
