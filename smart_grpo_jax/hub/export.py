"""The way out: LoRA files, a whole transformer, each read back and compared before it counts as written.

lora    pytorch_lora_weights.safetensors (diffusers, ComfyUI) and peft/ (peft, flow_grpo)
full    transformer/: what `from_pretrained` loads, adapters merged, sharded above SHARD bytes
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from smart_grpo_jax.core.errors import StorageError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import adapters, folder, safetensors, tables

SHARD = 5 * 10**9
"""Bytes of a weight file, at most."""

BASE = "diffusion_pytorch_model"


class Check(NamedTuple):
    """What was found when a written model was read back."""

    name: str
    tensors: int
    difference: float
    from_base: float


def write_lora(out: Path, table: tables.Table, config: Any, lora: PyTree, rank: int, scale: float) -> None:
    """diffusers' file: the scale is folded into B, and the header says alpha = r, as every reader assumes
    where it reads no header."""
    tensors = adapters.to_tensors(table, config, lora, scale)
    settings = {
        f"{adapters.PREFIX}r": rank,
        f"{adapters.PREFIX}lora_alpha": rank,
        f"{adapters.PREFIX}target_modules": modules(tensors, adapters.PREFIX),
    }
    header = {"format": "pt", adapters.METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    safetensors.write(out / adapters.FILE, tensors, header)


def write_peft(
    out: Path, table: tables.Table, config: Any, lora: PyTree, rank: int, alpha: float, base: str
) -> None:
    """peft's folder with the run's own rank and alpha."""
    tensors = adapters.to_tensors(table, config, lora, 1.0, adapters.PEFT_PREFIX)
    safetensors.write(out / adapters.PEFT_FILE, tensors)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": modules(tensors, adapters.PEFT_PREFIX),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
    }
    folder.write_json(out / adapters.PEFT_CONFIG, settings)


def modules(tensors: Mapping[str, np.ndarray], prefix: str) -> list[str]:
    """The full paths of the adapted modules."""
    suffix = ".lora_A.weight"
    return sorted(key[len(prefix) : -len(suffix)] for key in tensors if key.endswith(suffix))


def merged(base: PyTree, lora: PyTree, scale: float, dtype: Any) -> Callable[[str], Any]:
    """leaf(path) of the base with the adapters folded in, made when it is asked for: W + scale·a b, summed
    in float32."""
    leaves, factors = flatten_dict(base, sep="/"), flatten_dict(lora, sep="/")
    kept: dict[str, Any] = {}

    def leaf(path: str) -> Any:
        if path not in kept:
            kept.clear()  # one leaf at a time: the tensors of a leaf come one after the other
            value, stem = leaves[path], path.rsplit("/", 1)[0]
            if path.endswith("/kernel") and f"{stem}/a" in factors:
                delta = jnp.einsum("...ir,...ro->...io", factors[f"{stem}/a"], factors[f"{stem}/b"])
                value = value.astype(jnp.float32) + scale * delta
            kept[path] = jnp.asarray(value, dtype)
        return kept[path]

    return leaf


def write_transformer(
    out: Path,
    table: tables.Table,
    config: Any,
    published: Mapping[str, Any],
    leaf: Callable[[str], Any],
    dtype: Any,
    shard: int = SHARD,
) -> None:
    """config.json and the weights of a transformer, one shard in memory at a time."""
    folder.write_json(out / "config.json", {"_class_name": table.name, **published})
    plan = list(shards(table, config, leaf, np.dtype(dtype).itemsize, shard))
    if len(plan) == 1:
        safetensors.write(out / f"{BASE}.safetensors", {key: make() for key, make in plan[0]})
        return
    where, total = {}, 0
    for number, part in enumerate(plan, 1):
        name = f"{BASE}-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {key: make() for key, make in part}
        safetensors.write(out / name, tensors)
        where |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    folder.write_json(
        out / f"{BASE}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
    )


def shards(
    table: tables.Table, config: Any, leaf: Callable[[str], Any], itemsize: int, limit: int
) -> Iterator[list[tuple[str, Callable[[], np.ndarray]]]]:
    """The tensors in groups of at most `limit` bytes (one tensor at least)."""
    part: list[tuple[str, Callable[[], np.ndarray]]] = []
    size = 0
    for key, shape, make in tables.lazily(table, config, leaf):
        nbytes = math.prod(shape) * itemsize
        if part and size + nbytes > limit:
            yield part
            part, size = [], 0
        part.append((key, make))
        size += nbytes
    yield part


def compare(
    name: str, found: jax.Array, wanted: jax.Array, base: jax.Array, tensors: int, tolerance: float
) -> Check:
    """The velocity of what was read back against the trainer's, in units of its maximum.

    A file that gives another velocity is no export; one that gives the base's is caught by the same number.
    """
    found, wanted, base = (np.asarray(v, np.float64) for v in (found, wanted, base))
    size = np.abs(wanted).max()
    difference = float(np.abs(found - wanted).max() / size)
    if not difference <= tolerance:
        raise StorageError(f"export {name}: velocity differs by {difference:.1e}, wanted ≤ {tolerance:.0e}")
    return Check(name, tensors, difference, float(np.abs(found - base).max() / size))
