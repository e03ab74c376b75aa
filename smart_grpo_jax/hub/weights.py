"""The weight-name tables of every network, and their abstract parameters.

Our trees name their modules as the published files do, so that most rows are patterns. A row's `first`
says which layer of the file is layer 0 of a scanned stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub.streaming import Transform
from smart_grpo_jax.hub.tables import Row, Table
from smart_grpo_jax.models.clip import CLIPConfig, CLIPText
from smart_grpo_jax.models.flux import Flux, FluxConfig
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig
from smart_grpo_jax.models.t5 import T5Config, T5Encoder
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig

SAME = Transform(None)
LINEAR = Transform((1, 0))  # torch [out, in] → kernel [in, out]
CONVOLUTION = Transform((2, 3, 1, 0))  # torch [out, in, h, w] → kernel [h, w, in, out]


def last_layer(config: MMDiTConfig) -> int:
    """The index of the layer that stands alone."""
    return config.num_layers - 1


def first_joint(config: MMDiTConfig) -> int:
    """The index of the first layer without dual attention."""
    return len(config.dual_attention_layers)


def first_layer(_: Any) -> int:
    """Stacks that begin with the first layer of the file."""
    return 0


def stack_rows(stack: str, prefix: str, first: Callable[[Any], int], scales: str) -> tuple[Row, ...]:
    """The rows of a scanned stack: linear layers, biases and norm scales."""
    return (
        Row(rf"{stack}/(.*)/kernel", prefix + r".{i}.\1.weight", LINEAR, first),
        Row(rf"{stack}/(.*)/bias", prefix + r".{i}.\1.bias", SAME, first),
        Row(rf"{stack}/({scales})/scale", prefix + r".{i}.\1.weight", SAME, first),
    )


PLAIN = (
    Row(r"(.*)/kernel", r"\1.weight", LINEAR),
    Row(r"(.*)/(bias)", r"\1.\2", SAME),
    Row(r"(.*)/scale", r"\1.weight", SAME),
)


def abstract(module: nn.Module, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> PyTree:
    """The abstract parameters of a module whose inputs have these shapes."""
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def inputs_of(config: MMDiTConfig | FluxConfig) -> tuple[tuple[int, ...], ...]:
    """The smallest inputs of a velocity network: latents, times, tokens, pooled text (and guidance)."""
    side = config.token_side
    inputs = (
        (1, side, side, config.latent_channels),
        (1,),
        (1, 1, config.joint_attention_dim),
        (1, config.pooled_projection_dim),
    )
    return (*inputs, (1,)) if config.embeds_guidance else inputs


@functools.cache
def mmdit_shapes(config: MMDiTConfig) -> PyTree:
    """The abstract parameters of the SD3 transformer."""
    return abstract(MMDiT(config), *inputs_of(config))


@functools.cache
def flux_shapes(config: FluxConfig) -> PyTree:
    """The abstract parameters of the FLUX transformer."""
    return abstract(Flux(config), *inputs_of(config))


@functools.cache
def vae_shapes(config: VAEConfig) -> PyTree:
    """The abstract parameters of the VAE."""
    return abstract(AutoencoderKL(config), (1, config.factor, config.factor, config.in_channels))


@functools.cache
def clip_shapes(config: CLIPConfig) -> PyTree:
    """The abstract parameters of a CLIP text encoder."""
    return abstract(CLIPText(config), (1, 2), dtype=jnp.int32)


@functools.cache
def t5_shapes(config: T5Config) -> PyTree:
    """The abstract parameters of a T5 encoder."""
    return abstract(T5Encoder(config), (1, 2), dtype=jnp.int32)


MMDIT = Table(
    "SD3Transformer2DModel",
    (
        Row(r"pos_embed/proj/kernel", "pos_embed.proj.weight", CONVOLUTION),
        Row(r"pos_embed/pos_embed", "pos_embed.pos_embed", SAME),
        *stack_rows("dual", "transformer_blocks", first_layer, ".*"),
        *stack_rows("joint", "transformer_blocks", first_joint, ".*"),
        *stack_rows("last", "transformer_blocks", last_layer, ".*"),
        *PLAIN,
    ),
    mmdit_shapes,
)

VAE = Table(
    "AutoencoderKL",
    (
        Row(r"(.*attentions_\d+/to_\w+)/kernel", r"\1.weight", LINEAR),
        Row(r"(.*)/kernel", r"\1.weight", CONVOLUTION),
        *PLAIN[1:],
    ),
    vae_shapes,
    aliases=(
        (r"(attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    ),
)

CLIP_TEXT = Table(
    "CLIPTextModel",
    (
        Row(r"(token|position)_embedding", r"text_model.embeddings.\1_embedding.weight", SAME),
        *stack_rows("encoder/layers", "text_model.encoder.layers", first_layer, ".*"),
        Row(r"final_layer_norm/scale", "text_model.final_layer_norm.weight", SAME),
        Row(r"final_layer_norm/bias", "text_model.final_layer_norm.bias", SAME),
        Row(r"text_projection/kernel", "text_projection.weight", LINEAR),
    ),
    clip_shapes,
    aliases=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
    ignored=(r".*\.position_ids",),
)

FLUX = Table(
    "FluxTransformer2DModel",
    (
        *stack_rows("double", "transformer_blocks", first_layer, ".*"),
        *stack_rows("single", "single_transformer_blocks", first_layer, ".*"),
        *PLAIN,
    ),
    flux_shapes,
)

T5 = Table(
    "T5EncoderModel",
    (
        Row(r"shared", "shared.weight", SAME),
        Row(
            r"relative_attention_bias",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            SAME,
        ),
        *stack_rows("block", "encoder.block", first_layer, ".*"),
        Row(r"final_layer_norm/scale", "encoder.final_layer_norm.weight", SAME),
    ),
    t5_shapes,
    aliases=((r"^encoder\.embed_tokens\.weight$", "shared.weight"),),
)
