"""Stored scores that a reward must give again: images, prompts and numbers in one JSON file.

    {"reward": "image_reward", "tolerance": 0.01,
     "examples": [{"image": "a.png", "prompt": "a red dog", "score": 0.5813}, …]}

Images are found from the file's own folder; an example may have a `tolerance` of its own. With "weights" (a
folder beside the file) and "options" a file says which reward it means in full: so do those of this package,
whose scores are those of the originals' code on tiny random weights (tests/make_reward_fixtures.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards import base

FIXTURES = Path(base.__file__).parent / "fixtures"
"""Where this package keeps its own."""

NAME = "examples.json"
"""What such a file is called in a folder."""

FIELDS = {"reward", "tolerance", "weights", "options", "examples"}


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture's stored score."""

    image: Path
    prompt: str
    score: float
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of one reward; `weights` is empty where the run's own are meant."""

    file: Path
    reward: str
    weights: str
    options: Mapping[str, Any]
    examples: tuple[Example, ...]


def read(file: Path) -> Examples:
    """A file of examples; what is wrong in it is one UserError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("examples"), list) or not data["examples"]:
        raise UserError(f'{file}: wanted {{"reward": NAME, "tolerance": NUMBER, "examples": [...]}}')
    if unknown := sorted(set(data) - FIELDS):
        raise UserError(f"{file}: got {unknown[0]!r}, wanted only {', '.join(sorted(FIELDS))}")
    name = base.known(str(data.get("reward")), f"{file}: reward")
    rows = tuple(row(file, i, entry, data.get("tolerance")) for i, entry in enumerate(data["examples"]))
    weights = str(file.parent / data["weights"]) if "weights" in data else ""
    return Examples(file, name, weights, dict(data.get("options", {})), rows)


def row(file: Path, index: int, entry: Any, tolerance: Any) -> Example:
    """One example, checked."""
    where = f"{file}: examples[{index}]"
    if not isinstance(entry, Mapping) or not {"image", "prompt", "score"} <= set(entry):
        raise UserError(f"{where}: wanted image, prompt and score")
    tolerance = entry.get("tolerance", tolerance)
    for field, value in (("score", entry["score"]), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where}: {field}: got {value!r}, wanted a number")
    image = file.parent / str(entry["image"])
    if not image.is_file():
        raise UserError(f"{where}: no image {image}")
    return Example(image, str(entry["prompt"]), float(entry["score"]), float(tolerance))


def picture(path: Path) -> Float[np.ndarray, "H W 3"]:
    """An image file in [0, 1]."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), np.float32) / 255
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from error


Score = Callable[[Float[Array, "b H W 3"], Sequence[str]], Float[np.ndarray, " b"]]


def scores(score: Score, examples: Sequence[Example]) -> Float[np.ndarray, " n"]:
    """Our scores of the examples; images of one size go together."""
    images = [picture(example.image) for example in examples]
    out = np.full(len(examples), np.nan)
    for size in dict.fromkeys(image.shape for image in images):
        some = [i for i, image in enumerate(images) if image.shape == size]
        out[some] = score(
            jnp.asarray(np.stack([images[i] for i in some])), [examples[i].prompt for i in some]
        )
    return out


def worst(examples: Sequence[Example], ours: Float[np.ndarray, " n"]) -> tuple[float, int]:
    """(largest error in units of its tolerance, where); infinite where a score is missing."""
    errors = np.array(
        [abs(x - e.score) / max(e.tolerance, 1e-12) for x, e in zip(ours, examples, strict=True)]
    )
    errors = np.where(np.isfinite(errors), errors, np.inf)
    return float(errors.max()), int(errors.argmax())
