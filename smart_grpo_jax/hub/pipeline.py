"""A diffusers folder as a `Pipeline`: prompts → conditioning → velocity → latents → images.

Methods are for people; training takes the pure forms of `functions.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Conditioning, DecodeFn, PyTree, VelocityFn, negative_of
from smart_grpo_jax.hub import adapters, folder, functions, tables, weights
from smart_grpo_jax.hub.families import NETWORKS, Family
from smart_grpo_jax.hub.folder import Layout
from smart_grpo_jax.hub.folder import save_pipeline as save_pipeline
from smart_grpo_jax.hub.functions import RawVelocity, TransformerConfig
from smart_grpo_jax.hub.locate import pipeline_folder as pipeline_folder
from smart_grpo_jax.hub.scheduler import Scheduler
from smart_grpo_jax.hub.text import Text, load_text
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.models.lora import LoRA
from smart_grpo_jax.models.vae import VAEConfig

Size = int | tuple[int, int]
"""Pixels of an image: one side, or (height, width)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded text-to-image model. `params` has one tree per network of the image side, by its published
    name; `text` is None where the text encoders were not loaded."""

    family: Family
    transformer: TransformerConfig
    vae: VAEConfig
    scheduler: Scheduler
    text: Text | None
    params: Mapping[str, PyTree]
    dtype: Any
    t5_length: int
    tiling: bool = False

    @property
    def token_side(self) -> int:
        """Latents per image token, along one side."""
        return self.transformer.token_side

    @property
    def weights_table(self) -> tables.Table:
        """The weight names of the transformer."""
        return NETWORKS[self.family.networks["transformer"]].table

    def image_tokens(self, size: Size | None = None) -> int:
        """Tokens of an image of `size` pixels."""
        height, width, _ = self.latent_shape(size)
        return height * width // self.token_side**2

    def shift(self, size: Size | None = None) -> float:
        """The scheduler's time shift; e^mu where it is dynamic."""
        return self.scheduler.factor(self.image_tokens(size))

    def times(self, num_steps: int, size: Size | None = None, shift: float = 0.0) -> np.ndarray:
        """The pipeline's own grid 1 … 0, one value more than steps; `shift` replaces the scheduler's."""
        return self.scheduler.times(num_steps, self.image_tokens(size), self.family.gives_sigmas, shift)

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """(h, w, c) of the latents of an image of `size` pixels; by default the model's own size."""
        net, factor = self.transformer, self.vae.factor
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        if size is None:
            height = width = net.default_side * factor
        step = factor * net.token_side
        limit = net.longest_side
        for side in (height, width):
            if side < step or side % step or (limit and side // step > limit):
                most = f", at most {limit * step}" if limit else ""
                raise UserError(f"size: got {height}x{width}, wanted multiples of {step} pixels{most}")
        return height // factor, width // factor, net.latent_channels

    def encode(self, prompts: Sequence[str], compact: bool = False) -> Conditioning:
        """Prompts → one row each; see `Text.encode`."""
        if self.text is None:
            raise UserError("encode: the text encoders are not loaded, wanted load_pipeline(…, text=True)")
        return self.text.encode(prompts, compact)

    def velocity_fn(
        self,
        rank: int = 0,
        alpha: float = 0.0,
        targets: Sequence[str] = (),
        remat: str = "none",
        attention: str = "xla",
    ) -> RawVelocity:
        """The raw network as a pure function of {"params": …, "lora": …}."""
        options = {"rank": rank, "alpha": alpha, "targets": tuple(targets), "attention": attention}
        return functions.velocity_fn(self.transformer, **options, dtype=self.dtype, remat=remat)

    def guided(self, velocity: RawVelocity, scale: float) -> VelocityFn:
        """The policy at a guidance scale, however guidance enters this network."""
        if self.transformer.embeds_guidance:
            return functions.embedded(velocity, scale)
        return functions.guided(velocity, scale) if self.family.doubles else velocity

    def unguided(self, velocity: RawVelocity, scale: float) -> VelocityFn:
        """The policy of one call: without a negative prompt, the guidance input set where there is one."""
        return functions.embedded(velocity, scale) if self.transformer.embeds_guidance else velocity

    def check_negative(self, prompt: str) -> None:
        """UserError for a negative prompt where nothing would read it."""
        if prompt and not self.family.doubles:
            raise UserError(f"negative prompt: got {prompt!r}, wanted none with a {self.family.name}")

    def calls(self, scale: float) -> int:
        """Network calls of one guided velocity."""
        return 2 if self.family.doubles and scale > 1 else 1

    def decode_fn(self) -> DecodeFn:
        """The decoder as a pure function of the VAE's parameters; float32, as all GRPO codes run it."""
        return functions.decode_fn(self.vae, self.tiling)

    def adapter(self, rank: int, alpha: float, targets: Sequence[str] = ()) -> tuple[Any, ...]:
        """What `lora.init_lora(key, *adapter)` takes: the network, its adapters, inputs as shapes."""
        wanted = tuple(targets) or functions.TARGETS[type(self.transformer)]
        net = functions.network(self.transformer, rank=rank, alpha=alpha, targets=wanted)
        shapes = weights.inputs_of(self.transformer)
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return net, LoRA(rank, alpha, wanted), *inputs

    def velocity(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        cond: Conditioning,
        guidance: float | Array | None = None,
    ) -> Array:
        """The raw network, without a negative prompt; `guidance` where the network takes it (FLUX dev)."""
        if guidance is not None and not self.transformer.embeds_guidance:
            name = self.weights_table.name
            raise UserError(f"velocity: got guidance {guidance}, which is no input of {name}")
        scale = None if guidance is None else jnp.asarray(guidance, jnp.float32)
        run = functions.compiled(self.velocity_fn())
        return run({"params": self.params["transformer"]}, x, t, cond, scale)

    def decode(self, x0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Latents → images in [0,1]."""
        return functions.compiled(self.decode_fn())(self.params["vae"], x0)

    def encode_images(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Images in [0,1] → latents (the mean)."""
        return functions.compiled(functions.encode_images_fn(self.vae, self.tiling))(
            self.params["vae"], images
        )

    def sample(
        self,
        prompts: Sequence[str],
        key: Array | None = None,
        latents: Float[Array, "b h w c"] | None = None,
        num_steps: int = 28,
        guidance: float = 4.5,
        negative: str | None = None,
        size: Size | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Images of the prompts. Noise: `latents`, or drawn from `key` (default: key 0). A `Prompt` with its
        own negative prompt is led away from that."""
        if latents is None:
            key = jax.random.key(0) if key is None else key
            latents = jax.random.normal(key, (len(prompts), *self.latent_shape(size)))
        else:
            size = (latents.shape[1] * self.vae.factor, latents.shape[2] * self.vae.factor)
        if len(latents) != len(prompts):
            raise UserError(f"sample: got {len(latents)} latents for {len(prompts)} prompts")
        negatives = list(dict.fromkeys(negative_of(prompt, negative or "") for prompt in prompts))
        for text in negatives:
            self.check_negative(text)
        kind = "doubled" if self.calls(guidance) == 2 else "none"
        kind = "embedded" if self.transformer.embeds_guidance else kind
        policy = {"params": self.params["transformer"], "guidance": jnp.float32(guidance)}
        if kind == "doubled":
            if len(negatives) > 1:
                negatives = [negative_of(prompt, negative or "") for prompt in prompts]
            policy["negative"] = self.encode(negatives, compact=True)
        return functions.run_sampler(
            functions.sampling_policy(self.velocity_fn(), kind),
            self.decode_fn(),
            {"policy": policy, "vae": self.params["vae"]},
            jnp.asarray(latents, jnp.float32),
            jnp.asarray(self.times(num_steps, size)),
            self.encode(prompts, compact=True),
        )


def load_pipeline(
    path: str | Path,
    dtype: str = "float32",
    lora: str | Path | None = None,
    t5_length: int = 256,
    *,
    text: bool = True,
    tiling: bool = False,
    layout: Layout = folder.default_device,
) -> Pipeline:
    """Load a diffusers folder, a hub id whose files are in the local cache, or "shapes".

    The networks compute in `dtype`, the VAE always in float32. `lora` is a file or folder of adapters,
    folded into the weights. `t5_length` is the number of T5 tokens (diffusers: 256 for SD3, 512 for FLUX),
    or of zeros that stand for an absent T5. Without `text` the encoders stay on disk; `layout` says where
    each parameter lies; `tiling` decodes and encodes large images in tiles.
    """
    root, kept = pipeline_folder(path), folder.compute_type(dtype)
    family, _ = folder.index(root)
    classes = folder.components(root)
    configs = {name: folder.read_config(root, name, kind) for name, kind in classes.items()}
    params = {}
    for name, each in (("transformer", kept), ("vae", jnp.float32)):
        params[name] = folder.read_params(root, name, classes[name], configs[name], each, layout)
    if lora is not None:
        table = NETWORKS[classes["transformer"]].table
        params["transformer"] = adapters.fold(
            Path(lora), table, configs["transformer"], params["transformer"]
        )
    return Pipeline(
        family=family,
        transformer=configs["transformer"],
        vae=configs["vae"],
        scheduler=Scheduler.from_json(read_json(root / "scheduler", "scheduler_config.json")),
        text=load_text(path, dtype, t5_length, layout=layout) if text else None,
        params=params,
        dtype=kept,
        t5_length=t5_length,
        tiling=tiling,
    )
