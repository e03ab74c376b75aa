"""Where weights lie: a folder, a file, inside this package, or a hub id in the local cache.

Nothing is downloaded: gigabytes are the user's to order.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.worlds import shapes

EMBEDDED = "shapes"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def pipeline_folder(path: str | Path) -> Path:
    """The folder with the model_index.json."""
    text = str(path)
    if text == EMBEDDED:
        return Path(shapes.__file__).parent / "pipeline"
    if os.path.isfile(os.path.join(text, "model_index.json")):
        return Path(text)
    if os.path.exists(text):
        raise UserError(f'model.path: got "{text}", wanted a folder with a model_index.json')
    if HUB_ID.fullmatch(text):
        return cached(text)
    raise UserError(
        f'model.path: got "{text}", wanted "{EMBEDDED}", a diffusers folder or a hub id (owner/name)'
    )


def cached(repository: str) -> Path:
    """The newest snapshot of a pipeline that huggingface_hub's cache holds."""
    return wanted_from_cache(repository, "model_index.json", "model.path")


def cached_folder(repository: str, file: str) -> Path | None:
    """The newest snapshot of a hub repository that holds this file; None where the cache has none."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found).parent if isinstance(found, str) else None


def wanted_from_cache(repository: str, file: str, field: str) -> Path:
    """The same, or one line that says how to get it."""
    found = cached_folder(repository, file)
    if found is not None:
        return found
    raise UserError(
        f"{field}: {repository} is not in the local cache; accept its licence at "
        f"https://huggingface.co/{repository}, then: hf download {repository}"
    )


def model_folder(path: str | Path | None, published: str, file: str, field: str) -> Path:
    """A folder that holds `file`: the given one, or a hub id's (`published` where nothing is given)."""
    if path is not None and (Path(path) / file).is_file():
        return Path(path)
    repository = published if path is None else str(path)
    if not os.path.exists(repository) and HUB_ID.fullmatch(repository):
        return wanted_from_cache(repository, file, field)
    raise UserError(f'{field}: got path "{path}", wanted a folder with a {file}, or a hub id (owner/name)')


def model_file(path: str | Path | None, published: str, file: str, field: str) -> Path:
    """A weight file: given, inside the given folder, or the published one in the local cache."""
    if path is None:
        return wanted_from_cache(published, file, field) / file
    return Path(path) / file if (Path(path) / file).is_file() else only_file(path, WEIGHTS, field)


WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
"""How the names of weight files end."""


def only_file(
    path: str | Path | None, endings: tuple[str, ...], field: str, without: tuple[str, ...] = ()
) -> Path:
    """The given file, or the one file in the given folder that ends so and does not begin with `without`."""
    if path is None:
        raise UserError(f"{field}: path is missing, wanted a file ({', '.join(endings)}) or its folder")
    if os.path.isfile(path):
        return Path(path)
    if not os.path.isdir(path):
        raise UserError(f'{field}: got path "{path}", wanted a file ({", ".join(endings)}) or its folder')
    found = sorted(
        file
        for file in Path(path).iterdir()
        if file.name.endswith(endings) and not file.name.startswith(without or ("\0",))
    )
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:3]) or "none"
        raise UserError(f'{field}: path "{path}" holds {names}, wanted one file ({", ".join(endings)})')
    return found[0]
