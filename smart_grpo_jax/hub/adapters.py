"""LoRA files ⇄ adapter trees: diffusers' file, peft's folder (flow_grpo's, Flow-Factory's), older spellings.

A file's keys are the weight table's, with the module's adapter in place of its weight. What its scale is
lies in the header, in adapter_config.json or in `alpha` tensors; a tree that was read has it folded in:

    y = W x + b(a x)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import safetensors, tables
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.models.lora import merge

FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
METADATA = "lora_adapter_metadata"

FACTORS = (
    ("a", re.compile(r"(\.lora_A(\.\w+)?|\.lora\.down|[._]lora_down|_lora\.down)\.weight$")),
    ("b", re.compile(r"(\.lora_B(\.\w+)?|\.lora\.up|[._]lora_up|_lora\.up)\.weight$")),
    ("alpha", re.compile(r"(\.lora|_lora)?\.alpha$")),
)
"""The spellings of a module's two factors and of its alpha."""

MODULES = (
    (re.compile(r"^(base_model\.model\.)?(transformer\.)?(?=[a-z])"), ""),
    (re.compile(r"\.processor\."), "."),  # attention processors, before diffusers took peft in
    (re.compile(r"\.to_out$"), ".to_out.0"),
)
"""What stands between a key's module and the published name."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, [], ()),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "peft_type": (None, "LORA"),
}
"""Settings of peft of which only these values mean a plain adapter."""

CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "kasa", "lora_ga")
"""Ways to begin that change the base weights, which the adapter's file does not hold."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a file says of its scale; where it says nothing, alpha is the rank."""

    alpha: float | None = None
    patterns: Mapping[str, float] = dataclasses.field(default_factory=dict)
    by_root: bool = False

    def of(self, module: str, rank: int) -> float:
        """alpha/rank, or alpha/√rank (rank-stabilised)."""
        alpha = self.alpha
        for pattern, value in self.patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(value)
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read(path: Path, table: tables.Table, config: Any) -> PyTree:
    """The adapter tree of a file or folder, its scale folded into b."""
    file = find(Path(path))
    reader = safetensors.Tensors(file)
    tensors = {key: reader.tensor(key) for key in reader.keys()}
    return to_tree(table, config, tensors, str(file), scale_of(file, reader.metadata()))


def find(path: Path) -> Path:
    """The weight file that a path means."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: got a {path.suffix or 'nameless'} file, wanted safetensors (no pickles)"
            )
        return path
    for folder in (path, path / "lora"):  # flow_grpo keeps its adapter in a folder of the checkpoint
        for name in (FILE, PEFT_FILE):
            if (folder / name).is_file():
                return folder / name
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin"):
        if (path / name).is_file():
            raise UserError(
                f"{path / name}: is a pickle and stays closed; save it with safe_serialization=True"
            )
    raise UserError(f"{path}: wanted a LoRA file, or a folder with {FILE} or {PEFT_FILE}")


def scale_of(file: Path, metadata: Mapping[str, str]) -> Scale:
    """The scale from the header that newer diffusers write, or from peft's config beside the file."""
    if (text := metadata.get(METADATA)) is not None:
        try:
            data = json.loads(text)
            found = {k.removeprefix(PREFIX): v for k, v in data.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: {METADATA} is not understood ({error!r})") from error
    elif file.name == PEFT_FILE:
        found = read_json(file.parent, PEFT_CONFIG)
        if not found:
            raise UserError(f"{file}: no {PEFT_CONFIG} beside it, so its scale is not known")
    else:
        return Scale()
    return settings(found, str(file))


def settings(data: Mapping[str, Any], file: str) -> Scale:
    """peft's settings; what is not a plain adapter is refused by name."""
    for name, plain in REFUSED.items():
        if data.get(name) not in plain:
            raise UserError(f"{file}: {name}: got {data[name]!r}, wanted {plain[-1]!r}")
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(f"{file}: init_lora_weights: got {start!r}, whose base weights are not in the file")
    try:
        patterns = {str(k): float(v) for k, v in (data.get("alpha_pattern") or {}).items()}
        return Scale(float(data["lora_alpha"]), patterns, bool(data.get("use_rslora", False)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: lora_alpha is not understood ({error!r})") from error


def kernels(table: tables.Table, config: Any) -> dict[str, tables.Place]:
    """Module path of ours → where its kernel lies in the published file."""
    found = tables.places(table, config)
    return {p.path.removesuffix("/kernel"): p for p in found if p.path.endswith("/kernel")}


def by_module(tensors: Mapping[str, np.ndarray], file: str) -> dict[str, dict[str, np.ndarray]]:
    """Published module → its factors and alpha, whatever the spelling of the keys."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        if key.startswith("text_encoder"):
            raise UserError(f"{file}: adapts a text encoder ({key!r}), wanted adapters of the transformer")
        for role, spelling in FACTORS:
            if spelling.search(key):
                module = spelling.sub("", key)
                for old, new in MODULES:
                    module = old.sub(new, module)
                if role in modules.setdefault(module, {}):
                    raise UserError(f"{file}: {module!r} has two factors {role}")
                modules[module][role] = tensor
                break
        else:
            raise UserError(f"{file}: {key!r} is no factor of an adapter, wanted lora_A or lora_B")
    if not modules:
        raise UserError(f"{file}: holds no adapter")
    return modules


def to_tree(
    table: tables.Table,
    config: Any,
    tensors: Mapping[str, np.ndarray],
    file: str,
    scale: Scale | None = None,
) -> PyTree:
    """Published tensors as an adapter tree; layers without an adapter get zeros, ranks are filled up."""
    left, leaves, scale = by_module(tensors, file), {}, scale or Scale()
    for path, place in kernels(table, config).items():
        shape = place.shape if len(place.shape) == 2 else (0, 0)
        found = {}
        for i, key in enumerate(place.keys):
            module = key.removesuffix(".weight")
            if module in left:
                found[i] = factors(left.pop(module), module, shape, scale, file)
        if not found:
            continue
        rank = max(len(b) for _, b in found.values())
        full_a = np.zeros((len(place.keys), shape[0], rank), np.float32)
        full_b = np.zeros((len(place.keys), rank, shape[1]), np.float32)
        for i, (a, b) in found.items():
            full_a[i, :, : len(b)], full_b[i, : len(b)] = a, b
        for name, factor in (("a", full_a), ("b", full_b)):
            leaves[f"{path}/{name}"] = jnp.asarray(factor if place.stacked else factor[0])
    if left:
        known = [key.removesuffix(".weight") for p in kernels(table, config).values() for key in p.keys]
        hint = nearest(min(left), known) if len(known) < 2000 else f"{table.name} has {len(known)}"
        raise UserError(f"{file}: no module {min(left)!r} ({len(left)} unknown; {hint})")
    return unflatten_dict(leaves, sep="/")


def factors(
    pair: Mapping[str, np.ndarray], module: str, shape: tuple[int, ...], scale: Scale, file: str
) -> tuple[np.ndarray, np.ndarray]:
    """a [in, r] and b [r, out] of one module, its scale in b."""
    if "a" not in pair or "b" not in pair:
        raise UserError(f"{file}: {module!r} lacks factor {'b' if 'a' in pair else 'a'}")
    a, b = (np.asarray(pair[name], np.float32) for name in "ab")
    rows, columns = shape
    if a.ndim != 2 or not len(a) or a.shape[1] != rows or b.shape != (columns, len(a)):
        raise UserError(
            f"{file}: {module!r} has an adapter {a.shape} {b.shape}, wanted r × {rows}, {columns} × r"
        )
    factor = scale.of(module, len(a))
    if "alpha" in pair:
        factor = number(pair["alpha"], module, file) / len(a)
    if not (np.isfinite(a).all() and np.isfinite(b).all() and math.isfinite(factor)):
        raise UserError(f"{file}: {module!r} holds numbers that are not finite")
    return a.T, factor * b.T


def number(tensor: np.ndarray, module: str, file: str) -> float:
    """An alpha: a tensor of one number."""
    if tensor.size != 1:
        raise UserError(f"{file}: {module!r} has an alpha of shape {tensor.shape}, wanted one number")
    return float(tensor.reshape(()))


def to_tensors(
    table: tables.Table, config: Any, lora: PyTree, scale: float, prefix: str = PREFIX
) -> dict[str, np.ndarray]:
    """An adapter tree as published float32 tensors with `scale` folded into B.

    So alpha = r holds, which is what every reader assumes of a file that says nothing.
    """
    leaves, tensors, where = flatten_dict(lora, sep="/"), {}, kernels(table, config)
    for path in sorted({name.rsplit("/", 1)[0] for name in leaves}):
        place = where[path]
        a, b = (np.asarray(leaves[f"{path}/{name}"], np.float32) for name in "ab")
        layers = zip(a, b, strict=True) if place.stacked else [(a, b)]
        for key, (one_a, one_b) in zip(place.keys, layers, strict=True):
            stem = prefix + key.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(one_a.T)
            tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(scale * one_b.T)
    return tensors


def fold(path: Path, table: tables.Table, config: Any, base: PyTree) -> PyTree:
    """The transformer's weights with the adapters of a file or folder folded in."""
    return merge(base, read(path, table, config), 1.0)


def start(file: Path, read_tree: PyTree, fresh: PyTree, scale: float) -> PyTree:
    """Fresh adapters that begin where a file's end: its factors, b divided by this run's scale.

    Ranks that the file does not have, and layers that it does not adapt, keep their fresh a and b = 0: they
    change nothing yet and can learn.
    """
    ours, theirs = (cast(dict[str, Any], flatten_dict(tree, sep="/")) for tree in (fresh, read_tree))
    for path in sorted({name.rsplit("/", 1)[0] for name in theirs}):
        if f"{path}/a" not in ours:
            raise UserError(f"adapter.init: {file} adapts {path}, which adapter.targets does not")
        rank, room = theirs[f"{path}/a"].shape[-1], ours[f"{path}/a"].shape[-1]
        if rank > room:
            raise UserError(f"adapter.rank: got {room}, wanted at least {rank}, the rank of {file}")
        a, b = ours[f"{path}/a"], ours[f"{path}/b"]
        used = jnp.any(theirs[f"{path}/a"] != 0, axis=-2, keepdims=True)
        ours[f"{path}/a"] = a.at[..., :rank].set(jnp.where(used, theirs[f"{path}/a"], a[..., :rank]))
        ours[f"{path}/b"] = b.at[..., :rank, :].set(theirs[f"{path}/b"] / scale)
    return unflatten_dict(ours, sep="/")
