"""The image tower of CLIP (transformers' `CLIPVisionModelWithProjection`), and the config of a whole CLIP.

    x = [class | patches] + positions,  normed;  encoder;  norm of the class token alone;  projection

The encoder is the text tower's (clip.py). The projection is the head of a reward: float32 always.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.models import published
from smart_grpo_jax.models.clip import ACTIVATIONS, WITHOUT_EFFECT, CLIPConfig, Encoder
from smart_grpo_jax.models.initializers import SMALL, ZEROS

GENERATION = (
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
    "prefix", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torchscript", "typical_p", "use_bfloat16",
)  # fmt: skip
"""What older files write into every config: of text generation, or without effect on the numbers."""


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision part of a CLIP's config.json, with transformers' defaults (files hold differences only)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            hint = nearest(self.hidden_act, ACTIVATIONS)
            raise UserError(f"CLIPVisionConfig.hidden_act: got {self.hidden_act!r}, {hint}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"CLIPVisionConfig.num_attention_heads: got {self.num_attention_heads}, wanted a divisor of "
                f"{self.hidden_size}"
            )

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


def read_clip(data: Mapping[str, Any]) -> tuple[CLIPConfig, CLIPVisionConfig]:
    """Text and vision config of a CLIPModel's config.json.

    The projection's width is the whole model's. A part given as `…_config_dict`, as older files do,
    overrides the part of the newer name in full, defaults included.
    """
    width = data.get("projection_dim", 512)

    def part(name: str, cls: type) -> Any:
        given = data.get(f"{name}_config_dict")
        given = data.get(f"{name}_config") if given is None else given
        ignored = (*WITHOUT_EFFECT, *GENERATION)
        return dataclasses.replace(published.read(cls, given or {}, fixed={}, ignored=ignored), **fixed)

    fixed = {"projection_dim": width}
    return part("text", CLIPConfig), part("vision", CLIPVisionConfig)


class CLIPVision(nn.Module):
    """Normalised images → one projected vector each, not yet of unit length."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b s s 3"]) -> Float[Array, "b p"]:
        """Float32 in and out; the tower computes in `dtype`."""
        c, size = self.config, (self.config.patch_size, self.config.patch_size)
        x = nn.Conv(
            c.hidden_size, size, size, "VALID", use_bias=False, dtype=self.dtype, name="patch_embedding"
        )(images)
        x = x.reshape(x.shape[0], -1, c.hidden_size)
        first = self.param("class_embedding", ZEROS, (c.hidden_size,)).astype(self.dtype)
        positions = self.param("position_embedding", SMALL, (c.tokens, c.hidden_size)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, c.hidden_size)), x], 1) + positions
        x = nn.LayerNorm(c.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(x)
        x, _ = Encoder(c, self.dtype, name="encoder")(x, None)
        pooled = nn.LayerNorm(c.layer_norm_eps, dtype=jnp.float32, name="post_layernorm")(x[:, 0])
        return nn.Dense(
            c.projection_dim,
            use_bias=False,
            dtype=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
            name="visual_projection",
        )(pooled)
