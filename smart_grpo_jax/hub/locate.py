"""Where a pipeline lies: a folder, the one inside this package, or a hub id in the local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.worlds import shapes

EMBEDDED = "shapes"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def pipeline_folder(path: str | Path) -> Path:
    """The folder with the model_index.json. Nothing is downloaded: gigabytes are the user's to order."""
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
    """The newest snapshot of a hub repository that huggingface_hub's cache holds."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model_index.json")
    if isinstance(found, str):
        return Path(found).parent
    raise UserError(
        f"model.path: {repository} is not in the local cache; accept its licence at "
        f"https://huggingface.co/{repository}, then: hf download {repository}"
    )
