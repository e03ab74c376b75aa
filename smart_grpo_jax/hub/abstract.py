"""Pipelines without weights: shapes, types and places of every parameter, for those who only want to count
or to compile.

The configs come from a folder where there is one, else from the published models by name, so that a machine
without the weights can plan for them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import Conditioning, PyTree
from smart_grpo_jax.hub import families, folder
from smart_grpo_jax.hub.families import NETWORKS, Family
from smart_grpo_jax.hub.folder import Layout
from smart_grpo_jax.hub.locate import EMBEDDED, pipeline_folder
from smart_grpo_jax.hub.pipeline import Pipeline
from smart_grpo_jax.hub.scheduler import Scheduler
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.models.clip import CLIPConfig
from smart_grpo_jax.models.presets import preset

PUBLISHED: Mapping[str, tuple[str, Scheduler]] = {
    "stabilityai/stable-diffusion-3.5-medium": ("sd35-medium", Scheduler(shift=3.0)),
    "stabilityai/stable-diffusion-3.5-large": ("sd35-large", Scheduler(shift=3.0)),
    "black-forest-labs/FLUX.1-dev": ("flux-dev", Scheduler(shift=3.0, use_dynamic_shifting=True)),
    "black-forest-labs/FLUX.1-schnell": ("flux-schnell", Scheduler(shift=1.0)),
}
"""Hub id → preset and published scheduler."""


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Configs of a pipeline's components, and what is not a network."""

    family: Family
    configs: Mapping[str, Any]
    scheduler: Scheduler
    clip_tokens: int


def blueprint(path: str) -> Blueprint:
    """The configs of a folder, of the embedded world, or of a published model."""
    if path == EMBEDDED or os.path.isdir(path):
        root = pipeline_folder(path)
        family, _ = folder.index(root)
        configs = {n: folder.read_config(root, n, kind) for n, kind in folder.components(root).items()}
        scheduler = Scheduler.from_json(read_json(root / "scheduler", "scheduler_config.json"))
        return Blueprint(family, configs, scheduler, clip_tokens(configs))
    if path not in PUBLISHED:
        raise UserError(
            f'model.path: got "{path}", wanted a folder or a published model ({nearest(path, PUBLISHED)})'
        )
    name, scheduler = PUBLISHED[path]
    configs = preset(name)
    return Blueprint(families.family_of(configs["transformer"]), configs, scheduler, clip_tokens(configs))


def clip_tokens(configs: Mapping[str, Any]) -> int:
    """Tokens that the CLIP encoders give to the transformer."""
    clips = [config for config in configs.values() if isinstance(config, CLIPConfig)]
    return clips[0].max_position_embeddings if clips else 0


def parameters(class_name: str, config: Any, dtype: Any, layout: Layout) -> PyTree:
    """The parameters of a network as shapes that lie somewhere."""
    place = layout(class_name, config)
    leaves = cast(dict[str, Any], flatten_dict(NETWORKS[class_name].table.abstract(config), sep="/"))
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place(path)) for path, leaf in leaves.items()
    }
    return unflatten_dict(placed, sep="/")


def pipeline(
    path: str, dtype: str, t5_length: int, *, tiling: bool = False, layout: Layout = folder.default_device
) -> Pipeline:
    """The pipeline whose parameters are shapes: what needs no numbers works."""
    plan, kept = blueprint(path), folder.compute_type(dtype)
    classes = plan.family.networks
    params = {
        name: parameters(classes[name], plan.configs[name], each, layout)
        for name, each in (("transformer", kept), ("vae", jnp.float32))
    }
    return Pipeline(
        family=plan.family,
        transformer=plan.configs["transformer"],
        vae=plan.configs["vae"],
        scheduler=plan.scheduler,
        text=None,
        params=params,
        dtype=kept,
        t5_length=t5_length,
        tiling=tiling,
    )


def conditioning(path: str, t5_length: int, rows: int) -> Conditioning:
    """What `rows` prompts become, as shapes."""
    plan = blueprint(path)
    net, width = plan.configs["transformer"], plan.configs["transformer"].joint_attention_dim
    with_t5 = any(name in plan.configs for name in plan.family.text if "T5" in plan.family.networks[name])
    clip = plan.clip_tokens * plan.family.doubles
    repeats = 1 if with_t5 else max(t5_length, 1)
    t5 = t5_length if with_t5 else min(t5_length, 1)
    shape = lambda *sizes: cast(jax.Array, jax.ShapeDtypeStruct(sizes, jnp.float32))
    return Conditioning(shape(rows, clip + t5, width), shape(rows, net.pooled_projection_dim), repeats)
