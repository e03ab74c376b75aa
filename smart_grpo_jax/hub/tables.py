"""One weight-name table per model, used both ways: published files ⇄ parameter trees.

A table is a list of (regex on our path, published key, transform). Our tree names its modules as the
file does, so that most of a key is the path with '/' for '.'; `{i}` is the layer of a stacked leaf. The
leaves come from the model's abstract parameters: every leaf must find its tensors, of its shape, and
every tensor of the file its leaf.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.models.clip import CLIPConfig, CLIPText
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig


class Reader(Protocol):
    """Tensors by their published key."""

    def keys(self) -> set[str]:
        """All keys of the file or files."""
        ...

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        ...

    def tensor(self, key: str) -> np.ndarray:
        """Read one tensor."""
        ...

    def file(self, key: str) -> str:
        """The name of the file that holds, or should hold, the tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Transform:
    """`read` turns a published tensor into ours, `write` turns ours back; both are axis orders."""

    order: tuple[int, ...] | None

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """published → ours."""
        return tensor if self.order is None else tensor.transpose(self.order)

    def write(self, tensor: np.ndarray) -> np.ndarray:
        """ours → published."""
        return tensor if self.order is None else tensor.transpose(np.argsort(self.order))


SAME = Transform(None)
LINEAR = Transform((1, 0))  # torch [out, in] → kernel [in, out]
CONVOLUTION = Transform((2, 3, 1, 0))  # torch [out, in, h, w] → kernel [h, w, in, out]


@dataclasses.dataclass(frozen=True)
class Row:
    """Paths that match `path` have the key `key` (a template of the match) and the transform.

    `first` tells which layer of the file is layer 0 of a stacked leaf; None for a leaf of one layer.
    """

    path: str
    key: str
    transform: Transform
    first: Callable[[Any], int] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a model, tried in order, and how its abstract parameters are made."""

    name: str
    rows: tuple[Row, ...]
    abstract: Callable[[Any], PyTree]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def place(self, path: str) -> tuple[Row, str]:
        """The row of a path, and its key with `{i}` left open."""
        for row in self.rows:
            if match := re.fullmatch(row.path, path):
                return row, dotted(match.expand(row.key))
        raise UserError(f"{self.name}: no row of the weight table matches {path!r}")

    def canonical(self, key: str) -> str:
        """The key as newer files write it."""
        for old, new in self.aliases:
            key = re.sub(old, new, key)
        return key


NUMBERED = re.compile(
    r"\b(to_out|net|down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers)_(\d+)\b"
)


def dotted(path: str) -> str:
    """to_out_0/x → to_out.0.x: where a module list of the file is part of one of our names."""
    return NUMBERED.sub(r"\1.\2", path).replace("/", ".")


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


@functools.cache
def mmdit_shapes(config: MMDiTConfig) -> PyTree:
    """The abstract parameters of the SD3 transformer."""
    p = config.patch_size
    inputs = ((1, p, p, config.in_channels), (1,), (1, 1, config.joint_attention_dim))
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (*inputs, (1, config.pooled_projection_dim))]
    return jax.eval_shape(MMDiT(config).init, jax.random.key(0), *arrays)["params"]


@functools.cache
def vae_shapes(config: VAEConfig) -> PyTree:
    """The abstract parameters of the VAE."""
    image = jax.ShapeDtypeStruct((1, config.factor, config.factor, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), image)["params"]


@functools.cache
def clip_shapes(config: CLIPConfig) -> PyTree:
    """The abstract parameters of a CLIP text encoder."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(CLIPText(config).init, jax.random.key(0), ids)["params"]


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


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf lies in a file: its keys (one per layer if stacked), its shape without layers."""

    path: str
    keys: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    transform: Transform


def places(table: Table, config: Any) -> Iterator[Place]:
    """All leaves of a model and their published keys."""
    for path, leaf in cast(dict[str, Any], flatten_dict(table.abstract(config), sep="/")).items():
        row, key = table.place(path)
        if row.first is None:
            yield Place(path, (key,), False, leaf.shape, row.transform)
        else:
            start = row.first(config)
            keys = tuple(key.format(i=start + i) for i in range(leaf.shape[0]))
            yield Place(path, keys, True, leaf.shape[1:], row.transform)


def to_params(
    table: Table,
    config: Any,
    reader: Reader,
    dtype: Any = None,
    put: Callable[[str, np.ndarray], Any] = lambda _, leaf: jnp.asarray(leaf),
) -> PyTree:
    """Read a parameter tree, leaf by leaf; `dtype` None keeps what the file holds.

    `put(path, leaf)` places a finished leaf, for instance straight onto its shards.
    """
    keys = {table.canonical(key): key for key in reader.keys()}
    all_places = list(places(table, config))
    check_keys(table, {key for place in all_places for key in place.keys}, keys, reader)
    leaves = {}
    for place in all_places:
        tensors = [read(table, place, keys[key], reader) for key in place.keys]
        leaf = np.stack(tensors) if place.stacked else tensors[0]
        leaves[place.path] = put(place.path, leaf if dtype is None else leaf.astype(dtype))
    return unflatten_dict(leaves, sep="/")


def check_keys(table: Table, wanted: set[str], found: Mapping[str, str], reader: Reader) -> None:
    """No tensor may be missing or unknown: one UserError that names the first of each kind."""
    missing = sorted(wanted - set(found))
    unknown = sorted(k for k in set(found) - wanted if not any(re.fullmatch(p, k) for p in table.ignored))
    if missing:
        raise UserError(
            f"{reader.file(missing[0])}: {table.name} lacks {missing[0]!r} ({len(missing)} missing, "
            f"{len(unknown)} unknown{f', first {unknown[0]!r}' if unknown else ''})"
        )
    if unknown:
        raise UserError(
            f"{reader.file(found[unknown[0]])}: {table.name} knows no {unknown[0]!r} "
            f"({len(unknown)} unknown; {nearest(unknown[0], wanted)})"
        )


def read(table: Table, place: Place, key: str, reader: Reader) -> np.ndarray:
    """One tensor in our layout, of the shape the model wants."""
    want = place.shape
    if place.transform.order is not None:
        want = tuple(want[axis] for axis in np.argsort(place.transform.order))
    if (got := reader.shape(key)) != want:
        raise UserError(f"{reader.file(key)}: {table.name} {key!r} has shape {got}, wanted {want}")
    return place.transform.read(reader.tensor(key))


def to_tensors(table: Table, config: Any, params: PyTree) -> dict[str, np.ndarray]:
    """A parameter tree as published tensors, contiguous, in the dtype of the leaves."""
    leaves = flatten_dict(params, sep="/")
    tensors: dict[str, np.ndarray] = {}
    for place in places(table, config):
        if place.path not in leaves:
            raise UserError(f"{table.name}: the parameters lack {place.path!r}")
        leaf = np.asarray(leaves.pop(place.path))
        want = (len(place.keys), *place.shape) if place.stacked else place.shape
        if leaf.shape != want:
            raise UserError(f"{table.name}: {place.path!r} has shape {leaf.shape}, wanted {want}")
        layers = leaf if place.stacked else leaf[None]
        for key, layer in zip(place.keys, layers, strict=True):
            tensors[key] = np.ascontiguousarray(place.transform.write(layer))
    if leaves:
        raise UserError(f"{table.name}: the parameters hold an unknown {min(leaves)!r}")
    return tensors
