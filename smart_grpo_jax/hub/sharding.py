"""Where the parameters of each network lie on the mesh: one strict table per class.

A rule gives mesh axes to the last axes of a leaf; the stacked layer axis in front is never split. A linear
layer [in, out] is split twice: along `tensor`, the features that only its neighbour sees (out of the first
layer of a pair, into the second), and along `fsdp` the other axis, gathered where it is used. An axis that
does not divide is left whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.rules import Rules
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub.families import NETWORKS

Tail = tuple[str | None, ...]
"""Mesh axes of the last axes of a leaf."""

FIRST: Tail = ("fsdp", "tensor")
"""The first linear layer of a pair: each part of `tensor` makes its share of the features."""
SECOND: Tail = ("tensor", "fsdp")
"""The second one: each part of `tensor` reads its share, and the results are added."""
ROWS: Tail = ("fsdp", None)
COLUMNS: Tail = (None, "fsdp")
WHOLE: Tail = ()

NORMS = (r"(bias|scale)$", WHOLE)

MMDIT = Rules(
    (r"attn2?/(to_[qkv]|add_[qkv]_proj)/kernel$", FIRST),
    (r"attn2?/(to_out_0|to_add_out)/kernel$", SECOND),
    (r"net_0/proj/kernel$", FIRST),
    (r"net_2/kernel$", SECOND),
    (r"norm\w*/linear/kernel$", ROWS),
    (r"(context_embedder|embedder/linear_\d)/kernel$", ROWS),
    (r"^pos_embed/pos_embed$", COLUMNS),
    (r"^(pos_embed/proj|proj_out)/kernel$", WHOLE),
    NORMS,
)

FLUX = Rules(
    (r"attn/(to_[qkv]|add_[qkv]_proj)/kernel$", FIRST),
    (r"attn/(to_out_0|to_add_out)/kernel$", SECOND),
    (r"(net_0/proj|single/proj_mlp)/kernel$", FIRST),
    (r"(net_2|single/proj_out)/kernel$", SECOND),
    (r"norm\w*/linear/kernel$", ROWS),
    (r"(context_embedder|embedder/linear_\d)/kernel$", ROWS),
    (r"^(x_embedder|proj_out)/kernel$", WHOLE),
    NORMS,
)

T5 = Rules(
    (r"SelfAttention/[qkv]/kernel$", FIRST),
    (r"(SelfAttention/o|DenseReluDense/wo)/kernel$", SECOND),
    (r"DenseReluDense/wi(_\d)?/kernel$", FIRST),
    (r"^shared$", ROWS),
    (r"^relative_attention_bias$", WHOLE),
    NORMS,
)

CLIP = Rules(
    (r"self_attn/[qkv]_proj/kernel$", FIRST),
    (r"(self_attn/out_proj|mlp/fc2)/kernel$", SECOND),
    (r"mlp/fc1/kernel$", FIRST),
    (r"^token_embedding$", ROWS),
    (r"^(position_embedding|text_projection/kernel)$", WHOLE),
    NORMS,
)

VAE = Rules((r"", WHOLE))
"""Convolutions of 0.3 GB in all: every device holds them."""

TABLES: Mapping[str, Rules] = {
    "SD3Transformer2DModel": MMDIT,
    "FluxTransformer2DModel": FLUX,
    "T5EncoderModel": T5,
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP,
    "AutoencoderKL": VAE,
}


def specs(class_name: str, config: Any) -> PyTree:
    """The Tail of every leaf of a network."""
    if class_name not in TABLES:
        raise UserError(f"sharding: got {class_name!r} ({nearest(class_name, TABLES)})")
    return TABLES[class_name].match(NETWORKS[class_name].table.abstract(config))


def fitted(tail: Tail, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The tail as a PartitionSpec of a leaf of this shape, without the axes that do not divide."""
    if not tail:
        return PartitionSpec()
    first = len(shape) - len(tail)
    kept = [
        axis if axis is not None and shape[first + i] % mesh.shape[axis] == 0 else None
        for i, axis in enumerate(tail)
    ]
    return PartitionSpec(*[None] * first, *kept)


def shardings(class_name: str, config: Any, mesh: Mesh) -> PyTree:
    """The NamedSharding of every leaf of a network."""
    shapes = NETWORKS[class_name].table.abstract(config)
    lie = lambda leaf, tail: NamedSharding(mesh, fitted(tail, leaf.shape, mesh))
    return jax.tree.map(lie, shapes, specs(class_name, config))


@functools.cache
def at_use(config_type: type) -> Callable[[str, Array], Array]:
    """What the networks of this config do with a parameter where it is multiplied: gather what lies over
    `fsdp`, so that the activations keep their batch axis; a gradient is summed into the parts."""
    table = next(TABLES[name] for name, network in NETWORKS.items() if network.config is config_type)

    def gathered(path: str, leaf: Array) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.shape["fsdp"] == 1:
            return leaf
        rest = fitted(table.value(path), leaf.shape, mesh)
        return _gather(PartitionSpec(*(None if axis == "fsdp" else axis for axis in rest)), rest, leaf)

    return gathered


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(used: PartitionSpec, rest: PartitionSpec, leaf: Array) -> Array:
    del rest
    return jax.lax.with_sharding_constraint(leaf, used)


def _gather_forward(used: PartitionSpec, rest: PartitionSpec, leaf: Array) -> tuple[Array, None]:
    return _gather(used, rest, leaf), None


def _gather_backward(used: PartitionSpec, rest: PartitionSpec, _: None, grad: Array) -> tuple[Array]:
    del used
    return (jax.lax.with_sharding_constraint(grad, rest),)


_gather.defvjp(_gather_forward, _gather_backward)


def layout(mesh: Mesh) -> Callable[[str, Any], Callable[[str], NamedSharding]]:
    """What load_pipeline takes: class and config → path → where that leaf lies."""

    def of(class_name: str, config: Any) -> Callable[[str], NamedSharding]:
        leaves = cast(dict[str, NamedSharding], flatten_dict(shardings(class_name, config, mesh), sep="/"))
        return leaves.__getitem__

    return of
