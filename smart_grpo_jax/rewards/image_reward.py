"""ImageReward v1.0: how well a picture follows its prompt and how good it looks, as people ranked them.

    score = (MLP(BLIP(image, prompt)[CLS]) - mean) / std

The prompt is cut to 35 word pieces, its first token stays [CLS] (BLIP's own matching head would replace it
by [ENC]). The text cannot be encoded in advance: all its layers but the first look at the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, ScoreFn, Scores
from smart_grpo_jax.hub import folder, locate, tables
from smart_grpo_jax.hub import reward_weights as names
from smart_grpo_jax.hub.fused import Split
from smart_grpo_jax.hub.streaming import Reader
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.hub.torch_files import open_tensors
from smart_grpo_jax.hub.wordpiece import load_wordpiece
from smart_grpo_jax.models.blip import BLIP, BertConfig, BLIPConfig, ViTConfig
from smart_grpo_jax.rewards import head
from smart_grpo_jax.rewards.base import Reward
from smart_grpo_jax.rewards.clip_models import count, shape_of, whole
from smart_grpo_jax.rewards.preprocess import PIPELINES

PUBLISHED, VOCABULARY = "THUDM/ImageReward", "google-bert/bert-base-uncased"
FILE, CONFIG = "ImageReward.pt", "med_config.json"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
HEAD_WIDTH = 64
"""Features of an attention head of every published ViT."""


def config_of(
    reader: Reader, med: Mapping[str, Any], vision_heads: int = 0, text_heads: int = 0
) -> BLIPConfig:
    """Sizes from the tensors; heads as given, else as med_config.json says, else 64 features each."""
    patch, positions = (
        shape_of(reader, VISION + "patch_embed.proj.weight", 4),
        shape_of(reader, VISION + "pos_embed", 3),
    )
    words = shape_of(reader, TEXT + "embeddings.word_embeddings.weight", 2)
    places = shape_of(reader, TEXT + "embeddings.position_embeddings.weight", 2)
    width, text_width = patch[0], words[1]
    vision = ViTConfig(
        hidden_size=width,
        intermediate_size=shape_of(reader, VISION + "blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=count(reader, VISION + "blocks."),
        num_attention_heads=vision_heads or med.get("vision_heads") or width // HEAD_WIDTH or 1,
        image_size=round((positions[1] - 1) ** 0.5) * patch[2],
        patch_size=patch[2],
    )
    text = BertConfig(
        hidden_size=text_width,
        intermediate_size=shape_of(reader, TEXT + "encoder.layer.0.intermediate.dense.weight", 2)[0],
        num_hidden_layers=count(reader, TEXT + "encoder.layer."),
        num_attention_heads=text_heads or med.get("num_attention_heads") or text_width // HEAD_WIDTH or 1,
        vocab_size=words[0],
        max_position_embeddings=places[0],
        layer_norm_eps=med.get("layer_norm_eps", 1e-12),
        encoder_width=width,
    )
    return BLIPConfig(vision, text)


FIXED: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "add_cross_attention": True,
}
"""What med_config.json may say of these: nothing else is built."""


def read_med(root: Path) -> Mapping[str, Any]:
    """med_config.json beside the weights; BERT-base's values where there is none."""
    data = read_json(root, CONFIG)
    for name, wanted in FIXED.items():
        if data.get(name, wanted) != wanted:
            raise UserError(f"{root / CONFIG}: {name}: got {data[name]!r}, wanted {wanted!r}")
    return data


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The network, its parameters, and the layers of its head."""

    config: BLIPConfig
    params: PyTree
    head: PyTree


def load(file: Path, dtype: Any, vision_heads: int = 0, text_heads: int = 0) -> Loaded:
    """Read ImageReward.pt, or the same tensors as safetensors."""
    raw = open_tensors(file)
    reader = Split(raw, names.BLIP_FUSED)
    config = config_of(reader, read_med(file.parent), vision_heads, text_heads)
    params = tables.to_params(names.IMAGE_REWARD, config, reader, dtype)
    layers = head.load(names.IMAGE_REWARD_HEAD, raw, config.text.hidden_size)
    return Loaded(config, params, layers)


def vocabulary(root: Path, given: str | None) -> Path:
    """The folder of BERT's vocabulary: given, beside the weights, or in the local cache."""
    if given is not None:
        return Path(given)
    for place in (root, root / "bert-base-uncased"):
        if (place / "vocab.txt").is_file() or (place / "tokenizer.json").is_file():
            return place
    for hub_id in (VOCABULARY, "bert-base-uncased"):
        if (found := locate.cached_folder(hub_id, "vocab.txt")) is not None:
            return found
    raise UserError(
        "reward image_reward: tokenizer is missing, wanted a folder with the vocab.txt of bert-base-uncased "
        f"(hf download {VOCABULARY})"
    )


def build(
    path: str | None = None,
    dtype: str = "float32",
    tokenizer: str | None = None,
    fast: bool = False,
    folded: bool = True,
    vision_heads: int = 0,
    text_heads: int = 0,
) -> Reward:
    """`path`: ImageReward.pt, or a folder with it; `tokenizer`: a folder with BERT's vocab.txt; `fast`
    resizes in one float pass; heads are given for sizes that were never published."""
    file = locate.model_file(path, PUBLISHED, FILE, "reward image_reward")
    kept = folder.compute_type(dtype)
    heads = (("vision_heads", vision_heads), ("text_heads", text_heads))
    loaded = load(file, kept, *(whole(f"image_reward: {name}", n) for name, n in heads))
    return of(loaded, vocabulary(file.parent, tokenizer), kept, fast=fast, folded=folded)


def of(
    loaded: Loaded,
    tokens: Path,
    dtype: Any,
    *,
    name: str = "image_reward",
    mean: float = MEAN,
    std: float = STD,
    fast: bool = False,
    folded: bool = True,
) -> Reward:
    """The reward of a loaded network."""
    tokenizer = load_wordpiece(tokens, LENGTH)

    def prepare(prompts: Sequence[str]) -> PyTree:
        ids, mask = tokenizer(prompts)
        return {"ids": ids, "mask": mask}

    layers = head.folded(loaded.head, mean, std) if folded else loaded.head
    params = {"blip": loaded.params, "head": jax.tree.map(jnp.asarray, layers)}
    score = score_fn(loaded.config, dtype, mean=mean, std=std, fast=fast, folded=folded)
    return Reward(name, params, prepare, score, uses_prompt=True)


def score_fn(
    config: BLIPConfig,
    dtype: Any,
    *,
    mean: float = MEAN,
    std: float = STD,
    fast: bool = False,
    folded: bool = True,
) -> ScoreFn:
    """The score as a function of {"blip": …, "head": …}."""
    net = BLIP(config, dtype)

    def score(params: PyTree, images: Float[Array, "b H W 3"], ctx: PyTree, t: Array | None = None) -> Scores:
        pixels = PIPELINES["image_reward"](images, config.vision.image_size, fast=fast)
        with folder.matmul_precision(dtype):
            seen = cast(Array, net.apply({"params": params["blip"]}, pixels, ctx["ids"], ctx["mask"]))
        if folded:
            value = head.affine(params["head"], seen)
        else:
            value = (head.layered(params["head"], seen) - mean) / std
        return Scores(value, jnp.isfinite(value), {})

    return score
