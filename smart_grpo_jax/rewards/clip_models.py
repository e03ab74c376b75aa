"""A CLIP from its files, parted in two: an image tower for the graph, a text tower that runs once per prompt.

Files: a transformers folder (config.json, weights, tokenizer), or an open_clip checkpoint (HPSv2).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import folder, locate, tables
from smart_grpo_jax.hub import reward_weights as names
from smart_grpo_jax.hub.fused import Split
from smart_grpo_jax.hub.streaming import Reader
from smart_grpo_jax.hub.tokenizers import Tokenizer, load_tokenizer, read_json
from smart_grpo_jax.hub.torch_files import open_tensors
from smart_grpo_jax.models.clip import CLIPConfig, CLIPOutput, CLIPText
from smart_grpo_jax.models.clip_vision import CLIPVision, CLIPVisionConfig, read_clip

TEXT_BATCH = 16
"""Prompts encoded at once; smaller calls are filled up, so that there is one program."""

IMAGE_HEADS = ("visual_projection", "post_layernorm")
"""What stays in float32 whatever the tower computes in."""

OPEN_HEADS: Mapping[int, int] = {1280: 80, 1664: 104}
"""Width of an open_clip image tower → width of its heads, where that is not 64 (H and bigG)."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers' configs, the reader of their weights and the tables of its format."""

    text: CLIPConfig
    vision: CLIPVisionConfig
    reader: Reader
    vision_table: tables.Table
    text_table: tables.Table

    def image_params(self, dtype: Any) -> PyTree:
        """The image tower in `dtype`, its head in float32."""
        params = tables.to_params(self.vision_table, self.vision, self.reader, jnp.float32)
        return narrowed(params, dtype, IMAGE_HEADS)

    def text_tower(self, tokens: Path, dtype: Any) -> TextTower:
        """The text tower, with the tokenizer of this folder."""
        params = tables.to_params(self.text_table, self.text, self.reader, dtype)
        return TextTower(self.text, load_tokenizer(tokens, self.text.max_position_embeddings), params, dtype)

    def scale(self) -> Float[Array, ""]:
        """exp(logit_scale)."""
        return jnp.exp(tables.to_params(names.SCALE, None, self.reader, jnp.float32)["logit_scale"])


def narrowed(params: PyTree, dtype: Any, kept: Sequence[str]) -> PyTree:
    """Parameters in `dtype`, except the modules of these names."""
    return {
        name: tree if name in kept else jax.tree.map(lambda a: a.astype(dtype), tree)
        for name, tree in params.items()
    }


def transformers_clip(path: str | Path | None, hub_id: str, reward: str) -> tuple[Clip, Path]:
    """A CLIPModel folder: given, or the published one in the local cache; also the folder itself."""
    root = locate.model_folder(path, hub_id, "config.json", f"reward {reward}")
    text, vision = read_clip(read_json(root, "config.json"))
    return Clip(text, vision, open_tensors(root), names.VISION, names.TEXT), root


def open_clip(path: str | Path, vision_heads: int = 0, text_heads: int = 0) -> Clip:
    """An open_clip checkpoint: its sizes are those of its tensors, its heads those of the published
    models (64 wide, 80 in ViT-H) where they are not given."""
    reader = Split(open_tensors(Path(path)), names.OPEN_FUSED)
    shape = functools.partial(shape_of, reader)
    conv, positions = shape("visual.conv1.weight", 4), shape("visual.positional_embedding", 2)
    table, context = shape("token_embedding.weight", 2), shape("positional_embedding", 2)
    width, text_width = conv[0], table[1]
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        projection_dim=shape("visual.proj", 2)[1],
        num_hidden_layers=count(reader, "visual.transformer.resblocks."),
        num_attention_heads=vision_heads or width // OPEN_HEADS.get(width, 64) or 1,
        image_size=round((positions[0] - 1) ** 0.5) * conv[2],
        patch_size=conv[2],
        hidden_act="gelu",
    )
    text = CLIPConfig(
        vocab_size=table[0],
        hidden_size=text_width,
        intermediate_size=shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        projection_dim=shape("text_projection", 2)[1],
        num_hidden_layers=count(reader, "transformer.resblocks."),
        num_attention_heads=text_heads or text_width // 64 or 1,
        max_position_embeddings=context[0],
        hidden_act="gelu",
        eos_token_id=2,  # the largest id of a prompt, as open_clip reads it
    )
    return Clip(text, vision, reader, names.OPEN_VISION, names.OPEN_TEXT)


def whole(field: str, value: float) -> int:
    """An option that counts; the command line hands numbers over as floats."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise UserError(f"reward {field}: got {value!r}, wanted a whole number ≥ 0")
    return int(value)


def shape_of(reader: Reader, key: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with this many axes."""
    if key not in reader.keys():
        raise UserError(f"{reader.file(key)}: lacks {key!r}")
    shape = reader.shape(key)
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{reader.file(key)}: {key!r} has shape {shape}, wanted {axes} axes")
    return shape


def count(reader: Reader, prefix: str) -> int:
    """How many numbered layers begin with the prefix."""
    found = {key[len(prefix) :].split(".")[0] for key in reader.keys() if key.startswith(prefix)}
    return len(found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(config: CLIPConfig, dtype: Any, params: PyTree, ids: Int[Array, "b s"]) -> Float[Array, "b p"]:
    """Unit vectors of prompts."""
    with folder.matmul_precision(dtype):
        out = cast(CLIPOutput, CLIPText(config, dtype).apply({"params": params}, ids))
    return unit(out.pooled)


def unit(x: Float[Array, "b p"]) -> Float[Array, "b p"]:
    """x / |x|, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True, eq=False)
class TextTower:
    """Prompts → unit vectors; a prompt that was seen before costs nothing."""

    config: CLIPConfig
    tokenizer: Tokenizer
    params: PyTree
    dtype: Any
    known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __call__(self, prompts: Sequence[str]) -> Float[np.ndarray, "n p"]:
        """One row per prompt, equal whatever company a prompt is encoded in."""
        new = [text for text in dict.fromkeys(map(str, prompts)) if text not in self.known]
        for start in range(0, len(new), TEXT_BATCH):
            some = new[start : start + TEXT_BATCH]
            ids = jnp.asarray(self.tokenizer([*some, *[""] * (TEXT_BATCH - len(some))]))
            rows = np.asarray(encode(self.config, self.dtype, self.params, ids))
            self.known.update(zip(some, rows, strict=False))
        return np.stack([self.known[str(prompt)] for prompt in prompts])


def embed_images(
    config: CLIPVisionConfig, dtype: Any, params: PyTree, pixels: Float[Array, "b s s 3"]
) -> Float[Array, "b p"]:
    """Unit vectors of normalised images."""
    with folder.matmul_precision(dtype):
        return unit(cast(Array, CLIPVision(config, dtype).apply({"params": params}, pixels)))
