"""LoRA files in the diffusers format ⇄ adapter trees.

The keys are the weight table's, with the module's adapter in place of its weight:
`transformer.<module>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], one pair per layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import safetensors, tables
from smart_grpo_jax.models.lora import merge
from smart_grpo_jax.models.mmdit import MMDiTConfig

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."


def kernels(config: MMDiTConfig) -> dict[str, tables.Place]:
    """Module path of ours → where its kernel lies in the published file."""
    found = tables.places(tables.MMDIT, config)
    return {p.path.removesuffix("/kernel"): p for p in found if p.path.endswith("/kernel")}


def names(key: str) -> tuple[str, str]:
    """The keys of A and B of the module whose weight is `key`."""
    stem = PREFIX + key.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def to_tensors(config: MMDiTConfig, lora: PyTree, scale: float) -> dict[str, np.ndarray]:
    """An adapter tree as published tensors with `scale` folded into B.

    So alpha = r holds, which is what every reader assumes of a file that says nothing.
    """
    leaves, tensors, where = flatten_dict(lora, sep="/"), {}, kernels(config)
    for path in sorted({name.rsplit("/", 1)[0] for name in leaves}):
        place = where[path]
        a, b = (np.asarray(leaves[f"{path}/{name}"], np.float32) for name in "ab")
        layers = zip(a, b, strict=True) if place.stacked else [(a, b)]
        for key, (one_a, one_b) in zip(place.keys, layers, strict=True):
            name_a, name_b = names(key)
            tensors[name_a] = np.ascontiguousarray(one_a.T)
            tensors[name_b] = np.ascontiguousarray(scale * one_b.T)
    return tensors


def to_tree(config: MMDiTConfig, tensors: Mapping[str, np.ndarray], file: str) -> PyTree:
    """Published tensors as an adapter tree; layers without an adapter get zeros."""
    left, leaves = dict(tensors), {}
    for path, place in kernels(config).items():
        pairs = [tuple(left.pop(name, None) for name in names(key)) for key in place.keys]
        present = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not present:
            continue
        rank, (rows, columns) = max(len(a) for a, _ in present), place.shape
        full_a, full_b = np.zeros((len(pairs), rows, rank)), np.zeros((len(pairs), rank, columns))
        for i, (a, b) in enumerate(pairs):
            if a is None or b is None:
                continue
            if a.shape != (len(a), rows) or b.shape != (columns, len(a)):
                raise UserError(
                    f"{file}: {place.keys[i]!r} has an adapter {a.shape} {b.shape} that does not fit"
                )
            full_a[i, :, : len(a)], full_b[i, : len(a)] = a.T, b.T
        for name, factor in (("a", full_a), ("b", full_b)):
            leaves[f"{path}/{name}"] = jnp.asarray(factor if place.stacked else factor[0], jnp.float32)
    if left:
        raise UserError(f"{file}: no module of the transformer has an adapter called {min(left)!r}")
    return unflatten_dict(leaves, sep="/")


def fold(path: Path, config: MMDiTConfig, base: PyTree) -> PyTree:
    """The transformer's weights with the adapters of a file, or of the file in a folder, folded in."""
    path = path / FILE if path.is_dir() else path
    reader = safetensors.Tensors(path)
    tree = to_tree(config, {key: reader.tensor(key) for key in reader.keys()}, str(path))
    return merge(base, tree, scale_of(reader.metadata(), str(path)))


def scale_of(metadata: Mapping[str, Any], file: str) -> float:
    """alpha/r from the header that newer diffusers writes; 1 where the file says nothing."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return 1.0
    try:
        data = json.loads(text)
        return float(data["transformer.lora_alpha"]) / float(data["transformer.r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: lora_adapter_metadata is not understood ({error!r})") from error
