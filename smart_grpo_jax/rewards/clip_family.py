"""Rewards that are an angle in CLIP's space: CLIPScore, PickScore, HPSv2, and the aesthetic predictor.

    cos = <image, text>,  both of unit length
    clip_score   cos;   hessel: 2.5 max(cos, 0) with "A photo depicts " before the prompt
    pick_score   exp(logit_scale) cos / divisor          Flow-GRPO divides by 26
    hps          cos
    aesthetic    w image + b                             no prompt

The image tower runs in the graph, on images as the original sees them (preprocess.py); the text tower runs
once per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree, ScoreFn, Scores
from smart_grpo_jax.hub import folder, locate
from smart_grpo_jax.hub.reward_weights import AESTHETIC_HEAD
from smart_grpo_jax.hub.torch_files import open_tensors
from smart_grpo_jax.models.clip_vision import CLIPVisionConfig
from smart_grpo_jax.rewards import clip_models, head
from smart_grpo_jax.rewards.base import Reward, no_prompt
from smart_grpo_jax.rewards.clip_models import Clip
from smart_grpo_jax.rewards.preprocess import PIPELINES, Pipeline

L14, B32 = "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"
PICK_SCORE, H14 = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS = "xswu/HPSv2"

Finish = Callable[[PyTree, Float[Array, " b"]], Float[Array, " b"]]


def aligned(
    name: str,
    clip: Clip,
    tokens: Path,
    dtype: str,
    pipeline: Pipeline,
    fast: bool,
    finish: Finish,
    params: PyTree | None = None,
    prefix: str = "",
) -> Reward:
    """A reward that is a function of the cosine between image and prompt; `finish` sees `params`."""
    kept = folder.compute_type(dtype)
    tower = clip.text_tower(tokens, kept)
    return Reward(
        name,
        {"vision": clip.image_params(kept), **(params or {})},
        lambda prompts: tower([prefix + prompt for prompt in prompts]),
        aligned_score(clip.vision, kept, pipeline, fast, finish),
        uses_prompt=True,
    )


def aligned_score(
    vision: CLIPVisionConfig, dtype: Any, pipeline: Pipeline, fast: bool, finish: Finish
) -> ScoreFn:
    """The score as a function of {"vision": …} and of what `finish` reads."""

    def score(
        params: PyTree, images: Float[Array, "b H W 3"], ctx: Float[Array, "b p"], t: Array | None = None
    ) -> Scores:
        pixels = pipeline(images, vision.image_size, fast=fast)
        image = clip_models.embed_images(vision, dtype, params["vision"], pixels)
        cosine = (image * ctx).sum(-1)
        value = finish(params, cosine)
        return Scores(value, jnp.isfinite(value), {"cosine": cosine})

    return score


VARIANTS = {
    "cosine": (L14, "clip", "", lambda _, cosine: cosine),
    "hessel": (B32, "image_reward", "A photo depicts ", lambda _, cosine: 2.5 * jnp.maximum(cosine, 0.0)),
}
"""Published model, its image pipeline, what stands before the prompt, and the score."""


def build_clip_score(
    path: str | None = None,
    dtype: str = "float32",
    variant: str = "cosine",
    fast: bool = False,
    tokenizer: str | None = None,
) -> Reward:
    """CLIPScore; `variant` cosine (ViT-L/14) or hessel (ViT-B/32). `path`: a CLIPModel folder."""
    if variant not in VARIANTS:
        raise UserError(f"reward clip_score: got variant {variant!r}, {nearest(variant, VARIANTS)}")
    published, pipeline, prefix, finish = VARIANTS[variant]
    clip, root = clip_models.transformers_clip(path, published, "clip_score")
    tokens = Path(tokenizer or root)
    return aligned("clip_score", clip, tokens, dtype, PIPELINES[pipeline], fast, finish, prefix=prefix)


def build_pick_score(
    path: str | None = None,
    dtype: str = "float32",
    divisor: float = 1.0,
    fast: bool = False,
    tokenizer: str | None = None,
) -> Reward:
    """PickScore v1; `divisor` 26 is Flow-GRPO's scale. `path`: a CLIPModel folder."""
    if not divisor > 0:
        raise UserError(f"reward pick_score: got divisor {divisor}, want > 0 (try 26)")
    clip, root = clip_models.transformers_clip(path, PICK_SCORE, "pick_score")
    own = (root / "vocab.json").is_file() or (root / "tokenizer.json").is_file()
    tokens = Path(tokenizer) if tokenizer else root if own else published_tokenizer("pick_score")
    scale = {"scale": clip.scale()}
    return aligned("pick_score", clip, tokens, dtype, PIPELINES["clip"], fast, scaled(divisor), scale)


def scaled(divisor: float) -> Finish:
    """scale · cosine / divisor."""
    return lambda params, cosine: params["scale"] * cosine / divisor


def build_hps(
    path: str | None = None,
    dtype: str = "float32",
    version: str = "2.1",
    tokenizer: str | None = None,
    vision_heads: int = 0,
    text_heads: int = 0,
) -> Reward:
    """HPSv2 and 2.1: a fine-tuned CLIP-H. `path`: the .pt file, or a folder with it; `tokenizer`: a folder
    with CLIP's vocabulary, where the published one is not in the cache."""
    files = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
    version = str(version)  # the command line reads 2.1 as a number
    if version not in files:
        raise UserError(f"reward hps: got version {version!r}, {nearest(version, files)}")
    file = locate.model_file(path, HPS, files[version], "reward hps")
    heads = (("vision_heads", vision_heads), ("text_heads", text_heads))
    clip = clip_models.open_clip(file, *(clip_models.whole(f"hps: {name}", n) for name, n in heads))
    own = (file.parent / "vocab.json").is_file() or (file.parent / "tokenizer.json").is_file()
    tokens = Path(tokenizer) if tokenizer else file.parent if own else published_tokenizer("hps")
    return aligned("hps", clip, tokens, dtype, PIPELINES["hps"], False, lambda _, cosine: cosine)


def published_tokenizer(reward: str) -> Path:
    """CLIP's vocabulary in the local cache; any of the published models has it."""
    for hub_id in (H14, L14, B32):
        found = locate.cached_folder(hub_id, "vocab.json")
        if found is not None:
            return found
    raise UserError(
        f"reward {reward}: tokenizer is missing, wanted a folder with CLIP's vocab.json and merges.txt "
        f"(hf download {L14})"
    )


def build_aesthetic(
    path: str | None = None,
    dtype: str = "float32",
    clip: str | None = None,
    fast: bool = False,
    folded: bool = True,
) -> Reward:
    """LAION's aesthetic predictor V2. `path`: the head's .pth or .safetensors file, or a folder with it;
    `clip`: the folder of ViT-L/14 where it is neither beside the head nor in the cache. The head computes
    in float32 always; `folded = false` goes through its five layers."""
    head_file = locate.only_file(path, (".pth", ".pt", ".safetensors"), "reward aesthetic", ("model.",))
    beside = str(head_file.parent) if (head_file.parent / "config.json").is_file() else None
    model, _ = clip_models.transformers_clip(clip or beside, L14, "aesthetic")
    kept = folder.compute_type(dtype)
    layers = head.load(AESTHETIC_HEAD, open_tensors(head_file), model.vision.projection_dim)
    params = {"vision": model.image_params(kept), "head": head.folded(layers) if folded else layers}
    score = aesthetic_score(model.vision, kept, fast, folded)
    return Reward("aesthetic", params, no_prompt, score, uses_prompt=False)


def aesthetic_score(vision: CLIPVisionConfig, dtype: Any, fast: bool, folded: bool) -> ScoreFn:
    """The score as a function of {"vision": …, "head": …}."""

    def score(params: PyTree, images: Float[Array, "b H W 3"], ctx: PyTree, t: Array | None = None) -> Scores:
        pixels = PIPELINES["clip"](images, vision.image_size, fast=fast)
        image = clip_models.embed_images(vision, dtype, params["vision"], pixels)
        value = (head.affine if folded else head.layered)(params["head"], image)
        return Scores(value, jnp.isfinite(value), {})

    return score
