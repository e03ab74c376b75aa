"""A diffusers folder: which components there are, how each is read, and how a whole one is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.errors import StorageError, UserError, nearest
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import families, safetensors, tables
from smart_grpo_jax.hub.families import NETWORKS, Family
from smart_grpo_jax.hub.scheduler import CLASS as SCHEDULER
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.models.t5 import T5Config
from smart_grpo_jax.runtime.progress import Transfer

DIFFUSERS_VERSION = "0.31.0"  # the first with SD3.5; what a written config claims to need


DTYPES: Mapping[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""What networks compute in, and keep their weights in."""

Layout = Callable[[str, Any], Callable[[str], Any]]
"""layout(class name, config)(path) → the sharding of a parameter; None: the default device."""


def default_device(class_name: str, config: Any) -> Callable[[str], Any]:
    """The layout of one device."""
    del class_name, config
    return lambda path: None


def compute_type(name: str) -> Any:
    """The jax type of a config's `dtype`."""
    if name not in DTYPES:
        raise UserError(f"dtype: got {name!r}, {nearest(name, DTYPES)}")
    return DTYPES[name]


def matmul_precision(dtype: Any) -> Any:
    """A context in which float32 networks multiply in float32 on a TPU as well."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def index(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family and the model_index.json of a pipeline that can be loaded."""
    data = read_json(folder, "model_index.json")
    if not data:
        raise UserError(f"{folder}: no model_index.json; wanted a diffusers folder")
    return families.family(data.get("_class_name"), str(folder)), data


def components(folder: Path) -> dict[str, str]:
    """Component → class name, of those present. One that is listed but has no weight file is absent."""
    family, listed = index(folder)
    found = {}
    for name, wanted in family.networks.items():
        class_name = entry(folder, listed, name)
        base = NETWORKS[wanted].base
        present = class_name is not None and weight_file(folder / name, base) is not None
        if present and class_name != wanted:
            raise UserError(f"{folder}: {name}: got a {class_name}, wanted a {wanted}")
        if name not in family.optional and not present:
            raise UserError(f"{folder}: {name}: no {base}.safetensors in {name}/")
        if present:
            found[name] = wanted
    return found


def entry(folder: Path, listed: Mapping[str, Any], name: str) -> str | None:
    """The class that model_index.json gives a component; None for [null, null] and for one left out."""
    row = listed.get(name) or (None, None)
    if not isinstance(row, (list, tuple)) or len(row) != 2:
        raise UserError(f"{folder}: model_index.json: {name}: got {row!r}, wanted [library, class]")
    return row[1]


def weight_file(folder: Path, base: str) -> Path | None:
    """The weight file of a component, if it is there."""
    names = (f"{base}.safetensors.index.json", f"{base}.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_config(folder: Path, name: str, class_name: str) -> Any:
    """The config of a component as its dataclass."""
    data = read_json(folder / name, "config.json")
    if not data:
        raise UserError(f"{folder / name}: no config.json")
    network = NETWORKS[class_name]
    if network.library == "transformers":  # the index decides: CLIP's class says whether it projects
        data = {**data, "architectures": [class_name]}
    return network.config.from_json(data)


def open_weights(folder: Path, name: str, class_name: str) -> safetensors.Tensors:
    """The tensors of a component."""
    return safetensors.open_folder(folder / name, NETWORKS[class_name].base)


def read_params(
    folder: Path,
    name: str,
    class_name: str,
    config: Any,
    dtype: Any,
    layout: Layout = default_device,
) -> PyTree:
    """The parameters of a component, streamed to where they will lie; long reads tell how far they are."""
    reader = open_weights(folder, name, class_name)
    count = sum(int(np.prod(reader.shape(key))) for key in reader.keys())
    with Transfer(f"loading {name}", count, reader.nbytes()) as progress:
        table, place = NETWORKS[class_name].table, layout(class_name, config)
        return tables.to_params(table, config, reader, dtype, place, progress)


def save_pipeline(
    folder: Path,
    *,
    tokenizers: Mapping[str, Mapping[str, str]],
    scheduler: Mapping[str, Any],
    **networks: tuple[Mapping[str, Any] | Any, PyTree],
) -> None:
    """Write a whole diffusers folder.

    A network is (config.json or its dataclass, parameters), given by its component's name; `tokenizers`
    maps a tokenizer's folder to {file name: text}. What SD3 may do without (T5) may be left out;
    `StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)` loads that.
    """
    folder = Path(folder)
    family = family_of(networks)
    listed: dict[str, Any] = {"_class_name": family.name, "_diffusers_version": DIFFUSERS_VERSION}
    for name, class_name in family.networks.items():
        if name in networks:
            write_component(folder, name, class_name, *networks[name])
            listed[name] = [NETWORKS[class_name].library, class_name]
        elif name in family.optional:
            listed[name] = [None, None]
        else:
            raise UserError(f"save_pipeline: {family.name} lacks {name!r}")
    for name, tokenizer in family.tokenizers.items():
        if name not in networks:
            listed[tokenizer] = [None, None]
            continue
        if tokenizer not in tokenizers:
            raise UserError(f"save_pipeline: tokenizers lacks {tokenizer!r}")
        for file, text in tokenizers[tokenizer].items():
            write_text(folder / tokenizer / file, text)
        kind = "T5TokenizerFast" if family.networks[name] == "T5EncoderModel" else "CLIPTokenizer"
        listed[tokenizer] = ["transformers", kind]
    head = {"_class_name": SCHEDULER, "_diffusers_version": DIFFUSERS_VERSION}
    write_json(folder / "scheduler" / "scheduler_config.json", {**head, **scheduler})
    listed["scheduler"] = ["diffusers", SCHEDULER]
    write_json(folder / "model_index.json", listed)


def family_of(networks: Mapping[str, tuple[Any, PyTree]]) -> Family:
    """The family of the transformer among these networks."""
    config, _ = networks.get("transformer", (None, None))
    if isinstance(config, Mapping):
        name = config.get("_class_name", families.SD3.networks["transformer"])
        return next(f for f in families.FAMILIES.values() if f.networks["transformer"] == name)
    if config is None:
        raise UserError("save_pipeline: got no transformer")
    return families.family_of(config)


def write_component(folder: Path, name: str, class_name: str, config: Any, params: PyTree) -> None:
    """config.json and the weights of one network."""
    network = NETWORKS[class_name]
    data: dict[str, Any] = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
    if network.library == "transformers":
        data.pop("projection", None)
        kind = "t5" if network.config is T5Config else "clip_text_model"
        head = {"architectures": [class_name], "model_type": kind, "dtype": "float32"}
    else:
        head = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}
    data = {**head, **data}
    made = network.config.from_json(data)
    tensors = tables.to_tensors(network.table, made, jax.tree.map(np.asarray, params))
    write_json(folder / name / "config.json", {**data, **block_types(name, data)})
    safetensors.write(folder / name / f"{network.base}.safetensors", tensors)


def block_types(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The names of a VAE's stages, which diffusers reads from the config."""
    if name != "vae":
        return {}
    stages = len(data["block_out_channels"])
    return {
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A readable JSON file."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """One text file, its folders made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error})") from error
