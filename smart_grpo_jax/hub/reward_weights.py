"""The weight-name tables of the reward models: CLIP as transformers and as open_clip write it, BLIP, and
the five linear layers of the published heads.

A CLIP file holds two towers and a scale; a table reads its tower and names what it leaves to the others.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub.fused import Fused
from smart_grpo_jax.hub.tables import Row, Table
from smart_grpo_jax.hub.weights import (
    CLIP_TEXT,
    CONVOLUTION,
    LINEAR,
    SAME,
    abstract,
    clip_shapes,
    first_layer,
    stack_rows,
)
from smart_grpo_jax.models.blip import BLIP, BLIPConfig
from smart_grpo_jax.models.clip_vision import CLIPVision, CLIPVisionConfig


@functools.cache
def vision_shapes(config: CLIPVisionConfig) -> PyTree:
    """The abstract parameters of a CLIP image tower."""
    return abstract(CLIPVision(config), (1, config.image_size, config.image_size, config.num_channels))


@functools.cache
def blip_shapes(config: BLIPConfig) -> PyTree:
    """The abstract parameters of BLIP."""
    side = config.vision.image_size
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((1, side, side, 3), jnp.float32), ((1, 2), jnp.int32), ((1, 2), jnp.int32))
    ]
    return jax.eval_shape(BLIP(config).init, jax.random.key(0), *inputs)["params"]


def single(name: str) -> PyTree:
    """The abstract parameters of a model that is one number."""
    return {name: jax.ShapeDtypeStruct((), jnp.float32)}


VISION = Table(
    "CLIPVisionModelWithProjection",
    (
        Row(r"class_embedding", "vision_model.embeddings.class_embedding", SAME),
        Row(r"position_embedding", "vision_model.embeddings.position_embedding.weight", SAME),
        Row(r"patch_embedding/kernel", "vision_model.embeddings.patch_embedding.weight", CONVOLUTION),
        *stack_rows("encoder/layers", "vision_model.encoder.layers", first_layer, ".*"),
        Row(r"visual_projection/kernel", "visual_projection.weight", LINEAR),
        Row(r"(pre_layrnorm|post_layernorm)/scale", r"vision_model.\1.weight", SAME),
        Row(r"(pre_layrnorm|post_layernorm)/bias", r"vision_model.\1.bias", SAME),
    ),
    vision_shapes,
    ignored=(r".*\.position_ids", r"text_model\..*", r"text_projection\.weight", "logit_scale"),
)

TEXT = Table(
    "CLIPTextModelWithProjection",
    CLIP_TEXT.rows,
    clip_shapes,
    ignored=(r".*\.position_ids", r"vision_model\..*", r"visual_projection\.weight", "logit_scale"),
)

SCALE = Table(
    "CLIPModel",
    (Row("logit_scale", "logit_scale", SAME),),
    lambda _: single("logit_scale"),
    ignored=(r"(text|vision)_model\..*", r"(text|visual)_projection\.weight"),
)

OPEN_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn/(q_proj|k_proj|v_proj)": r"attn.\1",
    "self_attn/out_proj": "attn.out_proj",
    "mlp/fc1": "mlp.c_fc",
    "mlp/fc2": "mlp.c_proj",
}
"""Modules of our encoder layer → those of open_clip's, its fused projection parted by OPEN_FUSED."""

BLIP_NAMES = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn/(q|k|v)_proj": r"attn.\1",
    "self_attn/out_proj": "attn.proj",
    "mlp/(fc1|fc2)": r"mlp.\1",
}
"""The same for timm's ViT, which BLIP uses."""


def renamed(stack: str, prefix: str, names: dict[str, str]) -> tuple[Row, ...]:
    """The rows of a CLIP encoder in a file with other names for its modules."""
    rows = []
    for ours, theirs in names.items():
        leaves = ((r"kernel", "weight", LINEAR), (r"scale", "weight", SAME), (r"bias", "bias", SAME))
        for leaf, key, transform in leaves:
            rows.append(
                Row(f"{stack}/layers/{ours}/{leaf}", f"{prefix}.{{i}}.{theirs}.{key}", transform, first_layer)
            )
    return tuple(rows)


OPEN_FUSED = (
    Fused(
        r"(.*\.attn)\.in_proj_(weight|bias)",
        tuple(rf"\1.{name}_proj.\2" for name in "qkv"),
    ),
)

OPEN_VISION = Table(
    "open_clip's VisionTransformer",
    (
        Row(r"class_embedding", "visual.class_embedding", SAME),
        Row(r"position_embedding", "visual.positional_embedding", SAME),
        Row(r"patch_embedding/kernel", "visual.conv1.weight", CONVOLUTION),
        *renamed("encoder", "visual.transformer.resblocks", OPEN_NAMES),
        Row(r"pre_layrnorm/scale", "visual.ln_pre.weight", SAME),
        Row(r"pre_layrnorm/bias", "visual.ln_pre.bias", SAME),
        Row(r"post_layernorm/scale", "visual.ln_post.weight", SAME),
        Row(r"post_layernorm/bias", "visual.ln_post.bias", SAME),
        Row(r"visual_projection/kernel", "visual.proj", SAME),  # stored as it is multiplied: [in, out]
    ),
    vision_shapes,
    ignored=(
        r"(transformer|token_embedding|ln_final)\..*",
        "positional_embedding",
        "text_projection",
        "logit_scale",
        "attn_mask",
    ),
)

OPEN_TEXT = Table(
    "open_clip's TextTransformer",
    (
        Row(r"token_embedding", "token_embedding.weight", SAME),
        Row(r"position_embedding", "positional_embedding", SAME),
        *renamed("encoder", "transformer.resblocks", OPEN_NAMES),
        Row(r"final_layer_norm/scale", "ln_final.weight", SAME),
        Row(r"final_layer_norm/bias", "ln_final.bias", SAME),
        Row(r"text_projection/kernel", "text_projection", SAME),
    ),
    clip_shapes,
    ignored=(r"visual\..*", "logit_scale", "attn_mask"),
)

BLIP_FUSED = (Fused(r"(.*\.attn)\.qkv\.(weight|bias)", tuple(rf"\1.{name}.\2" for name in "qkv")),)

IMAGE_REWARD = Table(
    "ImageReward",
    (
        Row(r"visual_encoder/(cls_token|pos_embed)", r"blip.visual_encoder.\1", SAME),
        Row(r"visual_encoder/patch_embed/kernel", "blip.visual_encoder.patch_embed.proj.weight", CONVOLUTION),
        Row(r"visual_encoder/patch_embed/bias", "blip.visual_encoder.patch_embed.proj.bias", SAME),
        *renamed("visual_encoder/blocks", "blip.visual_encoder.blocks", BLIP_NAMES),
        Row(r"visual_encoder/norm/scale", "blip.visual_encoder.norm.weight", SAME),
        Row(r"visual_encoder/norm/bias", "blip.visual_encoder.norm.bias", SAME),
        Row(
            r"text_encoder/embeddings/(word|position)_embeddings",
            r"blip.text_encoder.embeddings.\1_embeddings.weight",
            SAME,
        ),
        Row(
            r"text_encoder/embeddings/LayerNorm/scale",
            "blip.text_encoder.embeddings.LayerNorm.weight",
            SAME,
        ),
        Row(r"text_encoder/embeddings/LayerNorm/bias", "blip.text_encoder.embeddings.LayerNorm.bias", SAME),
        *stack_rows("text_encoder/layer", "blip.text_encoder.encoder.layer", first_layer, ".*"),
    ),
    blip_shapes,
    ignored=(
        r".*\.position_ids",
        r"blip\.(vision|text)_proj\..*",
        r"blip\.text_encoder\.(pooler|cls)\..*",
        r"blip\.itm_head\..*",
        r"mlp\.layers\..*",
    ),
)

HEAD_LAYERS = (0, 2, 4, 6, 7)
"""The linear layers of the published heads; the numbers between them are dropouts."""


def head_table(name: str, prefix: str, others: tuple[str, ...] = ()) -> Table:
    """The five linear layers of a head whose keys begin with `prefix`."""

    def shapes(widths: Any) -> PyTree:
        sizes = zip(HEAD_LAYERS, widths[:-1], widths[1:], strict=True)
        return {
            f"layers_{n}": {
                "kernel": jax.ShapeDtypeStruct((before, after), jnp.float32),
                "bias": jax.ShapeDtypeStruct((after,), jnp.float32),
            }
            for n, before, after in sizes
        }

    rows = tuple(
        row
        for n in HEAD_LAYERS
        for row in (
            Row(rf"layers_{n}/kernel", rf"{prefix}{n}.weight", LINEAR),
            Row(rf"layers_{n}/bias", rf"{prefix}{n}.bias", SAME),
        )
    )
    return Table(name, rows, shapes, ignored=others)


AESTHETIC_HEAD = head_table("the aesthetic head", "layers.")
IMAGE_REWARD_HEAD = head_table("ImageReward's head", "mlp.layers.", (r"blip\..*",))
