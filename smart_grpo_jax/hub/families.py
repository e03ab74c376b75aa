"""The pipelines that can be read: a table by class name, so that nothing above asks which model it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.hub import tables, weights
from smart_grpo_jax.models.clip import CLIPConfig
from smart_grpo_jax.models.flux import FluxConfig
from smart_grpo_jax.models.mmdit import MMDiTConfig
from smart_grpo_jax.models.t5 import T5Config
from smart_grpo_jax.models.vae import VAEConfig


@dataclasses.dataclass(frozen=True)
class Network:
    """A class of published networks: its library, its weight file, its table and its config."""

    library: str
    base: str
    table: tables.Table
    config: Any


def _diffusers(table: tables.Table, config: Any) -> Network:
    return Network("diffusers", "diffusion_pytorch_model", table, config)


def _transformers(table: tables.Table, config: Any) -> Network:
    return Network("transformers", "model", table, config)


NETWORKS: Mapping[str, Network] = {
    "SD3Transformer2DModel": _diffusers(weights.MMDIT, MMDiTConfig),
    "FluxTransformer2DModel": _diffusers(weights.FLUX, FluxConfig),
    "AutoencoderKL": _diffusers(weights.VAE, VAEConfig),
    "CLIPTextModel": _transformers(weights.CLIP_TEXT, CLIPConfig),
    "CLIPTextModelWithProjection": _transformers(weights.CLIP_TEXT, CLIPConfig),
    "T5EncoderModel": _transformers(weights.T5, T5Config),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A pipeline class: its networks (component → class), which of them may be absent, the tokenizer of
    each text encoder, how guidance enters, and who makes the sigmas."""

    name: str
    networks: Mapping[str, str]
    tokenizers: Mapping[str, str]
    doubles: bool
    gives_sigmas: bool
    optional: tuple[str, ...] = ()

    @property
    def text(self) -> tuple[str, ...]:
        """The text encoders."""
        return tuple(self.tokenizers)


SD3 = Family(
    "StableDiffusion3Pipeline",
    networks={
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    tokenizers={
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    },
    doubles=True,
    gives_sigmas=False,
    optional=("text_encoder_3",),
)

FLUX = Family(
    "FluxPipeline",
    networks={
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    },
    tokenizers={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    doubles=False,
    gives_sigmas=True,
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (SD3, FLUX)}


def family(name: Any, source: str) -> Family:
    """The family of a model_index.json's `_class_name`."""
    if name not in FAMILIES:
        raise UserError(f"{source}: _class_name: got {name!r} ({nearest(str(name), FAMILIES)})")
    return FAMILIES[name]


def family_of(config: MMDiTConfig | FluxConfig) -> Family:
    """The family whose transformer has this config."""
    return FLUX if isinstance(config, FluxConfig) else SD3
