"""Configs as data, in the words of the published config files: real models by name, and tiny ones.

The real ones let `plan` count memory and time without a download; the tiny ones are for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models.clip import CLIPConfig
from smart_grpo_jax.models.flux import FluxConfig
from smart_grpo_jax.models.mmdit import MMDiTConfig
from smart_grpo_jax.models.t5 import T5Config
from smart_grpo_jax.models.vae import VAEConfig

Json = Mapping[str, Any]

VAE_16: Json = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

CLIP_L: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}

CLIP_BIG_G: Json = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "eos_token_id": 2,
}


T5_XXL: Json = {
    "architectures": ["T5EncoderModel"],
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def sd35(layers: int, dual: int, positions: int) -> dict[str, Json]:
    """Stable Diffusion 3.5: as many heads of 64 features as layers."""
    transformer = {
        "num_layers": layers,
        "num_attention_heads": layers,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * layers,
        "dual_attention_layers": list(range(dual)),
        "pos_embed_max_size": positions,
        "qk_norm": "rms_norm",
    }
    text = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_BIG_G, "text_encoder_3": T5_XXL}
    return {"transformer": transformer, "vae": VAE_16, **text}


VAE_FLUX: Json = {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}


def pooling(clip: Json) -> Json:
    """FLUX's use of CLIP: the pooled state as it is, without the projection."""
    return {**clip, "architectures": ["CLIPTextModel"]}


def flux(guidance: bool) -> dict[str, Json]:
    """FLUX.1; "dev" takes its guidance as an input, "schnell" knows none."""
    transformer = {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": guidance,
        "axes_dims_rope": [16, 56, 56],
    }
    text = {"text_encoder": pooling(CLIP_L), "text_encoder_2": T5_XXL}
    return {"transformer": transformer, "vae": VAE_FLUX, **text}


TINY: Mapping[str, Json] = {
    "transformer": {
        "sample_size": 3,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 14,
        "pos_embed_max_size": 5,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    "vae": {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 6,
        "scaling_factor": 1.3,
        "shift_factor": 0.1,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": {
        "vocab_size": 600,
        "hidden_size": 8,
        "intermediate_size": 16,
        "projection_dim": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 14,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
    },
    "text_encoder_2": {
        "vocab_size": 600,
        "hidden_size": 12,
        "intermediate_size": 20,
        "projection_dim": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 14,
        "hidden_act": "gelu",
        "eos_token_id": 2,
    },
}

TINY_FLUX: Mapping[str, Json] = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4],
    },
    "vae": TINY["vae"],
    "text_encoder": pooling(TINY["text_encoder"]),
}

PRESETS: Mapping[str, Mapping[str, Json]] = {
    "sd35-medium": sd35(24, 13, 384),
    "sd35-large": sd35(38, 0, 192),
    "flux-dev": flux(guidance=True),
    "flux-schnell": flux(guidance=False),
    "tiny": TINY,
    "tiny-flux": TINY_FLUX,
}

READERS: Mapping[str, Any] = {
    "SD3Transformer2DModel": MMDiTConfig,
    "FluxTransformer2DModel": FluxConfig,
    "AutoencoderKL": VAEConfig,
    "CLIPTextModel": CLIPConfig,
    "CLIPTextModelWithProjection": CLIPConfig,
    "T5EncoderModel": T5Config,
}

UNNAMED: Mapping[str, str] = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
"""The class of a component whose config names none."""


def class_name(part: str, data: Json) -> str:
    """The published class: diffusers writes `_class_name`, transformers a list of `architectures`."""
    architectures = data.get("architectures") or [UNNAMED.get(part, part)]
    return data.get("_class_name", architectures[0])


def preset(name: str) -> dict[str, Any]:
    """Component → config dataclass of a model by name."""
    if name not in PRESETS:
        raise UserError(f"preset: got {name!r}, {nearest(name, PRESETS)}")
    return {part: READERS[class_name(part, data)].from_json(data) for part, data in PRESETS[name].items()}
