"""Prompt sets and the draw of an epoch's groups.

A source is `shapes:SPLIT` (the embedded world), `tfds:NAME:SPLIT:FIELD` (read through `data_source`, so
without TensorFlow), or a file: one prompt per line, or JSON objects with a `prompt` if it ends in .jsonl.
The draw is stateless: the prompts of an epoch follow from the seed and the epoch's number.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.worlds.shapes import grammar


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, and what was left out while reading them.

    A `balanced` set takes its tasks in turn, so that every stretch of it has equal shares; prompts of the
    smaller tasks stand in it several times.
    """

    source: str
    prompts: tuple[str, ...]
    skipped: int = 0
    balanced: bool = False

    @property
    def sha(self) -> str:
        """A short fingerprint, so that a changed file is noticed when a run is resumed."""
        joined = "\n".join(self.prompts)
        return f"{zlib.crc32(joined.encode()):08x}"


def prompt_id(text: str) -> int:
    """A prompt's index into the key streams of an evaluation: a function of its text, whatever the subset."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def load(source: str) -> PromptSet:
    """Read a source; an empty, missing or unreadable one is a UserError."""
    kind, _, rest = source.partition(":")
    prompts, skipped = READERS[kind](rest) if kind in READERS else _file(source)
    if not prompts:
        raise UserError(f"prompts.source: {source} holds no prompt")
    return PromptSet(source, tuple(prompts), skipped, balanced=kind == "shapes")


def check(source: str, field: str = "prompts.source") -> None:
    """The part of `load` that needs no reading: does the source exist?"""
    kind, _, rest = source.partition(":")
    if kind == "shapes":
        _shapes_split(rest, field)
    elif kind == "tfds":
        if rest.count(":") != 2:
            raise UserError(f'{field}: got "{source}", wanted tfds:NAME:SPLIT:FIELD')
    elif not os.path.isfile(source):
        raise UserError(f'{field}: got "{source}", wanted shapes:SPLIT, tfds:NAME:SPLIT:FIELD or a file')


def _shapes_split(split: str, field: str = "prompts.source") -> list[str]:
    splits = grammar.splits()
    if split not in splits:
        raise UserError(f'{field}: got "shapes:{split}" ({nearest(split, splits)})')
    return [str(p) if isinstance(p, str) else grammar.text(p) for p in splits[split]]


def _shapes(rest: str) -> tuple[list[str], int]:
    """The six tasks in turn, as GenEval weighs them: equal shares, though position has 500 prompts and
    single_object 4."""
    by_task: dict[str, list[str]] = {}
    for text in _shapes_split(rest):
        by_task.setdefault(grammar.parse(text).task, []).append(text)
    longest = max(map(len, by_task.values()))
    return [texts[i % len(texts)] for i in range(longest) for texts in by_task.values()], 0


def _tfds(rest: str) -> tuple[list[str], int]:
    name, split, field = rest.split(":")
    import tensorflow_datasets as tfds

    source: Any = tfds.data_source(name, split=split)
    values = (source[i][field] for i in range(len(source)))
    return _clean(v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values)


def _file(path: str) -> tuple[list[str], int]:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompts.source: {path} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"prompts.source: {path}: {error.strerror}") from None
    lines = text.splitlines()
    return _clean(_json_lines(path, lines) if path.endswith(".jsonl") else lines)


def _json_lines(path: str, lines: list[str]) -> list[str]:
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f'prompts.source: {path} line {number} is no JSON object with a "prompt"'
            ) from None
    return prompts


def _clean(lines: Iterable[str]) -> tuple[list[str], int]:
    """Trimmed, without blanks, control characters' lines and repeats; how many lines were left out."""
    seen: dict[str, None] = {}
    total = 0
    for line in lines:
        total += 1
        text = " ".join(line.split())
        if text and text.isprintable():
            seen.setdefault(text)
    return list(seen), total - len(seen)


READERS: dict[str, Callable[[str], tuple[list[str], int]]] = {"shapes": _shapes, "tfds": _tfds}


def epoch_groups(count: int, groups: int, seed: int, epoch: int) -> np.ndarray:
    """Indices of the prompts of an epoch: distinct where the set allows it, every prompt once per round.

    A round is a permutation that follows from (seed, round); its last count % groups prompts rest.
    """
    per_round = max(1, count // groups)
    order = np.random.Generator(np.random.PCG64([seed, epoch // per_round])).permutation(count)
    start = (epoch % per_round) * groups
    return order[np.arange(start, start + groups) % count].astype(np.int32)


class Item(NamedTuple):
    """One prompt of an evaluation; `repeat` counts its earlier occurrences, which get other noise."""

    text: str
    repeat: int


def evaluation_items(prompts: PromptSet, number: int) -> list[Item]:
    """`number` prompts (0: each once), the same ones in every run: the first of a balanced set, else spread
    evenly over the set."""
    count = len(prompts.prompts)
    if number == 0:
        chosen = list(dict.fromkeys(prompts.prompts))
    elif prompts.balanced:
        chosen = [prompts.prompts[i % count] for i in range(number)]
    else:
        number = min(number, count)
        chosen = [prompts.prompts[i * count // number] for i in range(number)]
    seen: Counter[str] = Counter()
    items = []
    for text in chosen:
        items.append(Item(text, seen[text]))
        seen[text] += 1
    return items
