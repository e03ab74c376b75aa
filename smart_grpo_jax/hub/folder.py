"""A diffusers folder: which components there are, how each is read, and how a whole one is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smart_grpo_jax.core.errors import StorageError, UserError, nearest
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import safetensors, tables
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.models.clip import CLIPConfig
from smart_grpo_jax.models.mmdit import MMDiTConfig
from smart_grpo_jax.models.vae import VAEConfig

PIPELINE = "StableDiffusion3Pipeline"
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DIFFUSERS_VERSION = "0.31.0"  # the first with SD3.5; what a written config claims to need


@dataclasses.dataclass(frozen=True)
class Component:
    """A network of a pipeline: its library, its weight file, its table and its config, by class name."""

    library: str
    base: str
    classes: Mapping[str, tuple[tables.Table, Any]]


CLIP_CLASSES = {name: (tables.CLIP_TEXT, CLIPConfig) for name in ("CLIPTextModelWithProjection",)}
COMPONENTS: Mapping[str, Component] = {
    "transformer": Component(
        "diffusers", "diffusion_pytorch_model", {"SD3Transformer2DModel": (tables.MMDIT, MMDiTConfig)}
    ),
    "vae": Component("diffusers", "diffusion_pytorch_model", {"AutoencoderKL": (tables.VAE, VAEConfig)}),
    "text_encoder": Component("transformers", "model", CLIP_CLASSES),
    "text_encoder_2": Component("transformers", "model", CLIP_CLASSES),
    "text_encoder_3": Component("transformers", "model", {}),
}
REQUIRED = ("transformer", "vae", "text_encoder", "text_encoder_2")


def index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline that can be loaded."""
    data = read_json(folder, "model_index.json")
    if not data:
        raise UserError(f"{folder}: no model_index.json; wanted a diffusers folder")
    name = data.get("_class_name")
    if name != PIPELINE:
        raise UserError(f"{folder}: _class_name: got {name!r}, wanted {PIPELINE!r}")
    return data


def components(folder: Path) -> dict[str, str]:
    """Component → class name, of those present. One that is listed but has no weight file is absent."""
    listed = index(folder)
    found = {}
    for name, component in COMPONENTS.items():
        _, class_name = listed.get(name) or (None, None)
        present = class_name is not None and weight_file(folder / name, component.base) is not None
        if class_name is not None and present and class_name not in component.classes:
            known = nearest(class_name, component.classes) if component.classes else "leave the folder out"
            raise UserError(f"{folder}: {name}: cannot read a {class_name} ({known})")
        if name in REQUIRED and not present:
            raise UserError(f"{folder}: {name}: no {component.base}.safetensors in {name}/")
        if present:
            found[name] = class_name
    return found


def weight_file(folder: Path, base: str) -> Path | None:
    """The weight file of a component, if it is there."""
    names = (f"{base}.safetensors.index.json", f"{base}.safetensors")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_config(folder: Path, name: str, class_name: str) -> Any:
    """The config of a component as its dataclass."""
    data = read_json(folder / name, "config.json")
    if not data:
        raise UserError(f"{folder / name}: no config.json")
    return COMPONENTS[name].classes[class_name][1].from_json(data)


def read_params(folder: Path, name: str, class_name: str, config: Any, dtype: Any) -> PyTree:
    """The parameters of a component."""
    component = COMPONENTS[name]
    reader = safetensors.open_folder(folder / name, component.base)
    return tables.to_params(component.classes[class_name][0], config, reader, dtype)


def save_pipeline(
    folder: Path,
    *,
    transformer: tuple[Mapping[str, Any] | MMDiTConfig, PyTree],
    vae: tuple[Mapping[str, Any] | VAEConfig, PyTree],
    text_encoder: tuple[Mapping[str, Any] | CLIPConfig, PyTree],
    text_encoder_2: tuple[Mapping[str, Any] | CLIPConfig, PyTree],
    tokenizers: Mapping[str, Mapping[str, str]],
    scheduler: Mapping[str, Any],
) -> None:
    """Write a whole diffusers folder, without T5.

    A network is (config.json or its dataclass, parameters); `tokenizers` maps "tokenizer" and
    "tokenizer_2" to {file name: text}. `StableDiffusion3Pipeline.from_pretrained(folder,
    text_encoder_3=None, tokenizer_3=None)` loads the result.
    """
    folder = Path(folder)
    networks = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    listed: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": DIFFUSERS_VERSION}
    for name, (config, params) in networks.items():
        listed[name] = write_component(folder, name, config, params)
    for name in ("tokenizer", "tokenizer_2"):
        if name not in tokenizers:
            raise UserError(f"save_pipeline: tokenizers lacks {name!r}")
        for file, text in tokenizers[name].items():
            write_text(folder / name / file, text)
        listed[name] = ["transformers", "CLIPTokenizer"]
    head = {"_class_name": SCHEDULER, "_diffusers_version": DIFFUSERS_VERSION}
    write_json(folder / "scheduler" / "scheduler_config.json", {**head, **scheduler})
    listed["scheduler"] = ["diffusers", SCHEDULER]
    listed |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    write_json(folder / "model_index.json", listed)


def write_component(folder: Path, name: str, config: Any, params: PyTree) -> list[str]:
    """config.json and the weights of one network; gives its row in model_index.json."""
    component = COMPONENTS[name]
    class_name, (table, config_class) = next(iter(component.classes.items()))
    data: dict[str, Any] = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
    if component.library == "transformers":
        data.pop("projection", None)
        head = {"architectures": [class_name], "model_type": "clip_text_model", "dtype": "float32"}
    else:
        head = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION}
    data = {**head, **data}
    tensors = tables.to_tensors(table, config_class.from_json(data), jax.tree.map(np.asarray, params))
    write_json(folder / name / "config.json", {**data, **block_types(name, data)})
    safetensors.write(folder / name / f"{component.base}.safetensors", tensors)
    return [component.library, class_name]


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
