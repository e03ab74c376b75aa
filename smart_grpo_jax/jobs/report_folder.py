"""A run folder as the report reads it: what is there is loaded, what is missing or damaged is remembered."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import statistics
from smart_grpo_jax.runtime import metrics

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One evaluation: scores[prompt, seed] by name, and the pictures of the first prompts (first seed)."""

    epoch: int
    prompts: list[str]
    scores: dict[str, Float[np.ndarray, "m seeds"]]
    images: UInt8[np.ndarray, "n h w 3"]

    def strict(self) -> str | None:
        """The score that says right or wrong, the exact judge's before the second's."""
        names = [n for n in ("shapes/strict", "second/strict", *sorted(self.scores)) if n in self.scores]
        return next((n for n in names if n.endswith("/strict")), None)


@dataclasses.dataclass(frozen=True)
class Walk:
    """One-step decodes of the states along a rollout, without and with the search."""

    times: Float[np.ndarray, " steps"]
    prompts: list[str]
    plain: UInt8[np.ndarray, "steps p h w 3"]
    searched: UInt8[np.ndarray, "steps p h w 3"]


@dataclasses.dataclass(frozen=True)
class Story:
    """Everything the page is made of."""

    name: str
    config: dict[str, Any]
    command: str
    env: dict[str, Any]
    rows: Sequence[Row]
    evaluations: list[Stored]
    walk: Walk | None
    samples: list[tuple[int, bytes]]
    notes: list[str]

    @property
    def base(self) -> Stored | None:
        """The evaluation of epoch 0."""
        return next((e for e in self.evaluations if e.epoch == 0), None)

    @property
    def tuned(self) -> Stored | None:
        """The last evaluation after epoch 0, if it is on the prompts of the base."""
        last = self.evaluations[-1] if self.evaluations else None
        if last is None or last.epoch == 0 or self.base is None or last.prompts != self.base.prompts:
            return None
        return last

    def pair(self) -> tuple[Stored, Stored] | None:
        """Base and tuned, if both are there."""
        base, tuned = self.base, self.tuned
        return (base, tuned) if base is not None and tuned is not None else None

    def comparison(self) -> list[dict[str, float | str]]:
        """The paired table of base and tuned; no rows while one of them is missing."""
        pair = self.pair()
        return statistics.comparison(pair[0].scores, pair[1].scores, pair[0].prompts) if pair else []

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one logged name, where it is a number."""
        found = [(float(row["epoch"]), float(row[name])) for row in self.rows if is_number(row.get(name))]
        return [x for x, _ in found], [y for _, y in found]

    def last(self, name: str) -> float | None:
        """The newest value of one logged name."""
        values = self.series(name)[1]
        return values[-1] if values else None


def is_number(value: Any) -> bool:
    """Whether a logged value can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read(folder: Path) -> Story:
    """The story so far; UserError where there is no trace of a run."""
    folder = Path(folder)
    notes: list[str] = []
    rows = sorted(metrics.read(folder), key=lambda row: row["epoch"])
    evaluations = [e for p in _numbered(folder / "eval", ".npz") if (e := _evaluation(p, notes)) is not None]
    config = _json(folder / "config.json", notes)
    if not (rows or evaluations or config):
        raise UserError(f"{folder}: holds no run, wanted config.json, metrics.jsonl or eval/ (try --workdir)")
    return Story(
        name=folder.resolve().name,
        config=config,
        command=_text(folder / "command.txt"),
        env=_json(folder / "env.json", notes),
        rows=rows,
        evaluations=evaluations,
        walk=_walk(folder / "eval" / "steps.npz", notes),
        samples=[(int(p.stem), p.read_bytes()) for p in _ends(_numbered(folder / "samples", ".png"))],
        notes=notes,
    )


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """The files `<epoch><suffix>` of a folder, by epoch."""
    return sorted((p for p in folder.glob(f"*{suffix}") if p.stem.isdigit()), key=lambda p: int(p.stem))


def _ends(paths: Sequence[Path]) -> list[Path]:
    return [paths[0], *paths[1:][-1:]] if paths else []


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is damaged and was left out.")
        return {}
    return value


def _arrays(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz; a damaged file is a note, not the end of the page."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
        notes.append(f"eval/{path.name} is damaged and was left out.")
        return {}


def _evaluation(path: Path, notes: list[str]) -> Stored | None:
    arrays = _arrays(path, notes)
    if not arrays:
        return None
    scores = {k.removeprefix("score:"): v for k, v in arrays.items() if k.startswith("score:")}
    if "prompts" not in arrays or "images" not in arrays:
        notes.append(f"eval/{path.name} lacks its prompts or pictures and was left out.")
        return None
    return Stored(int(path.stem), [str(p) for p in arrays["prompts"]], scores, arrays["images"])


def _walk(path: Path, notes: list[str]) -> Walk | None:
    arrays = _arrays(path, notes)
    if not {"times", "prompts", "plain", "searched"} <= arrays.keys():
        return None
    return Walk(arrays["times"], [str(p) for p in arrays["prompts"]], arrays["plain"], arrays["searched"])
