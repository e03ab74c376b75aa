"""The published rewards without their weights: what they compute and how large they are, for a plan.

A skeleton scores like the reward of its name, but its parameters are shapes, and what it prepares of a
prompt is zeros of the right shape. Rewards without weights are their own skeletons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.types import PyTree, ScoreFn
from smart_grpo_jax.hub import folder
from smart_grpo_jax.hub.reward_weights import IMAGE_REWARD, VISION
from smart_grpo_jax.models.blip import BLIPConfig
from smart_grpo_jax.models.clip_vision import CLIPVisionConfig
from smart_grpo_jax.rewards import base, clip_family, clip_models, image_reward, mixture
from smart_grpo_jax.rewards.preprocess import PIPELINES

L14 = CLIPVisionConfig(1024, 4096, 768, 24, 16, patch_size=14)
B32 = CLIPVisionConfig()
H14 = CLIPVisionConfig(1280, 5120, 1024, 32, 16, patch_size=14, hidden_act="gelu")


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def cast(tree: PyTree, dtype: Any, kept: Sequence[str] = ()) -> PyTree:
    """Shapes in `dtype`, except the modules of these names."""
    return {
        name: jax.tree.map(lambda a, d=jnp.float32 if name in kept else dtype: shape(*a.shape, dtype=d), part)
        for name, part in tree.items()
    }


def tower(config: CLIPVisionConfig, dtype: Any) -> PyTree:
    """The parameters of an image tower."""
    return cast(VISION.abstract(config), dtype, clip_models.IMAGE_HEADS)


def vector(features: int) -> PyTree:
    """The parameters of a folded head."""
    return {"weight": shape(features), "bias": shape()}


def blip(dtype: Any, fast: bool = False, **_: Any) -> base.Reward:
    """ImageReward v1.0."""
    config = BLIPConfig()
    params = {"blip": cast(IMAGE_REWARD.abstract(config), dtype), "head": vector(config.text.hidden_size)}
    ids = lambda prompts: np.zeros((len(prompts), image_reward.LENGTH), np.int32)
    prepare = lambda prompts: {"ids": ids(prompts), "mask": ids(prompts)}
    score = image_reward.score_fn(config, dtype, fast=fast)
    return base.Reward("image_reward", params, prepare, score, uses_prompt=True)


def clip(name: str, config: CLIPVisionConfig, dtype: Any, score: ScoreFn, params: PyTree) -> base.Reward:
    """A reward that is an angle to the prompt."""
    prepare = lambda prompts: np.zeros((len(prompts), config.projection_dim), np.float32)
    return base.Reward(name, {"vision": tower(config, dtype), **params}, prepare, score, uses_prompt=True)


def aesthetic(dtype: Any, fast: bool = False, **_: Any) -> base.Reward:
    """LAION's aesthetic predictor on ViT-L/14."""
    params = {"vision": tower(L14, dtype), "head": vector(L14.projection_dim)}
    score = clip_family.aesthetic_score(L14, dtype, fast, folded=True)
    return base.Reward("aesthetic", params, base.no_prompt, score, uses_prompt=False)


def pick_score(dtype: Any, fast: bool = False, divisor: float = 1.0, **_: Any) -> base.Reward:
    """PickScore v1 on CLIP-H."""
    score = clip_family.aligned_score(H14, dtype, PIPELINES["clip"], fast, clip_family.scaled(divisor))
    return clip("pick_score", H14, dtype, score, {"scale": shape()})


def clip_score(dtype: Any, fast: bool = False, variant: str = "cosine", **_: Any) -> base.Reward:
    """CLIPScore on ViT-L/14 or ViT-B/32."""
    published, pipeline, _, finish = clip_family.VARIANTS[variant]
    config = B32 if published == clip_family.B32 else L14
    score = clip_family.aligned_score(config, dtype, PIPELINES[pipeline], fast, finish)
    return clip("clip_score", config, dtype, score, {})


def hps(dtype: Any, **_: Any) -> base.Reward:
    """HPSv2 on CLIP-H."""
    score = clip_family.aligned_score(H14, dtype, PIPELINES["hps"], False, lambda _, cosine: cosine)
    return clip("hps", H14, dtype, score, {})


SKELETONS: Mapping[str, Callable[..., base.Reward]] = {
    "image_reward": blip,
    "aesthetic": aesthetic,
    "pick_score": pick_score,
    "clip_score": clip_score,
    "hps": hps,
}


def build(name: str, entry: Any, limits: Host | None) -> base.Reward:
    """The skeleton of a mixture's entry; the reward itself where it has no published weights."""
    options = mixture.options_of(entry)
    kind = options.pop("kind", name)
    if kind not in SKELETONS:
        return mixture.built(name, entry, limits)
    options.pop("path", None)
    return SKELETONS[kind](folder.compute_type(options.pop("dtype", "float32")), **options)
