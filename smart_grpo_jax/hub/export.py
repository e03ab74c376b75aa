"""The way out: LoRA files, a whole transformer, each read back and compared before it counts as written.

lora    pytorch_lora_weights.safetensors (diffusers, ComfyUI) and peft/ (peft, flow_grpo)
full    transformer/: what `from_pretrained` loads, adapters merged, sharded above SHARD bytes

A file is right if its keys are those that were meant, each tensor has the bits that were meant, and the
network made of it has the trainer's velocity.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from smart_grpo_jax.core.errors import NumericsError, StorageError, UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import adapters, folder, safetensors, tables
from smart_grpo_jax.models.lora import folded

SHARD = 5 * 10**9
"""Bytes of a weight file, at most."""

BASE = "diffusion_pytorch_model"


class Check(NamedTuple):
    """What was found when a written model was read back: tensors equal to the bit, and the largest
    difference of its velocity from the trainer's and from the base's, over the velocity's maximum.
    `learned` is the difference of the trainer's from the base's."""

    name: str
    tensors: int
    difference: float
    from_base: float
    learned: float


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
    leaves, factors = (cast(dict[str, Any], flatten_dict(tree, sep="/")) for tree in (base, lora))
    kept: dict[str, Any] = {}

    def leaf(path: str) -> Any:
        if path not in kept:
            kept.clear()  # one leaf at a time: the tensors of a leaf come one after the other
            value, stem = leaves[path], path.rsplit("/", 1)[0]
            if path.endswith("/kernel") and f"{stem}/a" in factors:
                value = folded(value, factors[f"{stem}/a"], factors[f"{stem}/b"], scale)
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


def same_keys(name: str, reader: safetensors.Tensors, meant: Iterable[str]) -> int:
    """How many tensors a written file has: those that were meant, none more and none less."""
    found, wanted = reader.keys(), set(meant)
    if missing := wanted - found:
        raise StorageError(f"export {name}: {reader.path} has come back without {min(missing)!r}")
    if unknown := found - wanted:
        raise StorageError(f"export {name}: {reader.path} has come back with an unknown {min(unknown)!r}")
    return len(found)


def same_tensors(name: str, reader: safetensors.Tensors, meant: Iterable[tuple[str, np.ndarray]]) -> None:
    """Each tensor of a written file is equal to the bit to the one that was meant."""
    for key, wanted in meant:
        if not same_bits(reader.tensor(key), wanted):
            raise StorageError(f"export {name}: {reader.file(key)}: {key!r} has come back with other bits")


def same_trees(name: str, found: PyTree, meant: PyTree) -> None:
    """A tree that was read back has the names, shapes, types and bits that were meant."""
    ours, theirs = flatten_dict(meant, sep="/"), flatten_dict(found, sep="/")
    if odd := set(ours) ^ set(theirs):
        raise StorageError(f"export {name}: {min(odd)} is only in one of what was written and what was read")
    for path, leaf in ours.items():
        if not same_bits(np.asarray(theirs[path]), np.asarray(leaf)):
            raise StorageError(f"export {name}: {path} has come back with other bits")


def same_bits(found: np.ndarray, meant: np.ndarray) -> bool:
    """Equal shape, type and bytes; unlike ==, this tells zeros by their sign and knows that NaN is NaN."""
    if (found.shape, found.dtype) != (meant.shape, meant.dtype):
        return False
    raw = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (found, meant)]
    return np.array_equal(raw[0], raw[1])


@contextlib.contextmanager
def reading_back(name: str) -> Iterator[None]:
    """What our own reader refuses of our own file is a failed export, not a mistake of the user's."""
    try:
        yield
    except UserError as error:
        if type(error) is UserError:
            raise StorageError(f"export {name}: {error.line}") from error
        raise


def compare(
    name: str, found: jax.Array, wanted: jax.Array, base: jax.Array, tensors: int, tolerance: float
) -> Check:
    """The velocity of what was read back against the trainer's and the base's, in units of its maximum."""
    read, own, plain = (np.asarray(v, np.float64) for v in (found, wanted, base))
    if not np.isfinite(own).all():
        raise NumericsError(f"export {name}: the velocity of the checkpoint itself is not finite")
    off = lambda a, b: float(np.abs(a - b).max() / np.abs(own).max())
    check = Check(name, tensors, off(read, own), off(read, plain), off(own, plain))
    if not check.difference <= tolerance:
        raise StorageError(
            f"export {name}: velocity differs by {check.difference:.1e}, wanted ≤ {tolerance:.0e}"
        )
    return check
