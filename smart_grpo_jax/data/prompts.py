"""Prompt sets and the draw of an epoch's groups.

A source is `shapes:SPLIT` (the embedded world), `geneval:SPLIT` (GenEval's prompts), `tfds:NAME:SPLIT:FIELD`
(read through `data_source`, so without TensorFlow), or a file: one prompt per line, or JSON objects with a
`prompt` if it ends in .jsonl. The draw is stateless: the prompts of an epoch follow from the seed and the
epoch's number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import Prompt
from smart_grpo_jax.data import builders, geneval
from smart_grpo_jax.data.prompt_lines import Gathered, Stored, read_file
from smart_grpo_jax.runtime.progress import say
from smart_grpo_jax.worlds.shapes import grammar


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order, and what was left out while reading them: `skipped` bad lines, `repeats` of
    earlier texts, and one line on both (`report`).

    A `balanced` set takes its tasks in turn, so that every stretch of it has equal shares; prompts of the
    smaller tasks stand in it several times.
    """

    source: str
    prompts: tuple[str, ...]
    skipped: int = 0
    balanced: bool = False
    repeats: int = 0
    report: str = ""

    @functools.cached_property
    def sha(self) -> str:
        """A short fingerprint of texts, negative prompts and metadata, in this order: a changed file is
        noticed when a run is resumed."""
        found = hashlib.sha256()
        for prompt in self.prompts:
            found.update(prompt.encode("utf-8", "surrogatepass") + b"\n")
            if isinstance(prompt, Prompt):
                found.update(f"{prompt.negative!r} {written(prompt.metadata)}\n".encode())
        return found.hexdigest()[:16]


def written(metadata: Mapping[str, Any]) -> str:
    """Metadata as they came, or as JSON."""
    if isinstance(metadata, Stored):
        return metadata.line
    return json.dumps(dict(metadata), sort_keys=True, default=str)


def prompt_id(text: str) -> int:
    """A prompt's index into the key streams of an evaluation: a function of its text, whatever the subset."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def load(source: str, strict: bool = False, field: str = "prompts.source") -> PromptSet:
    """Read a source; an empty, missing or unreadable one is a UserError.

    Bad lines are skipped, and one line says how many, which and why; with `strict` the first one is a
    UserError.
    """
    kind, _, rest = source.partition(":")
    if kind in READERS:
        unit, found = "record", READERS[kind].read(rest, field, strict)
    else:
        unit, found = "line", read_file(source, field, strict)
    report = found.report(unit)
    if not found.prompts:
        raise UserError(f"{field}: {source} holds no prompt" + (f": {report}" if report else ""))
    if report:
        say(f"{field}: {source}: {report}")
    prompts = tuple(found.prompts)
    return PromptSet(source, prompts, found.skipped, kind == "shapes", found.repeats, report)


def check(source: str, field: str = "prompts.source") -> None:
    """The part of `load` that needs no reading: does the source exist?"""
    kind, colon, rest = source.partition(":")
    if kind in READERS:
        READERS[kind].check(rest, field)
    elif not os.path.isfile(source):
        hint = f" ({nearest(kind, READERS)})" if colon and "/" not in source else ""
        raise UserError(f'{field}: got "{source}", wanted {SOURCES} or a file{hint}')


def over_long(prompts: Sequence[str], truncated: Callable[[Sequence[str]], int], batch: int = 1000) -> int:
    """How many prompts lose words, asked of a tokenizer (`Tokenizer.truncated`) in batches."""
    return sum(truncated(prompts[i : i + batch]) for i in range(0, len(prompts), batch))


def _shapes_split(split: str, field: str) -> list[str]:
    splits = grammar.splits()
    if split not in splits:
        raise UserError(f'{field}: got "shapes:{split}" ({nearest(split, splits)})')
    return [str(p) if isinstance(p, str) else grammar.text(p) for p in splits[split]]


def _shapes(rest: str, field: str, strict: bool) -> Gathered:
    """The six tasks in turn, as GenEval weighs them: equal shares, though position has 500 prompts and
    single_object 4."""
    del strict
    by_task: dict[str, list[str]] = {}
    for text in _shapes_split(rest, field):
        by_task.setdefault(grammar.parse(text).task, []).append(text)
    longest = max(map(len, by_task.values()))
    return Gathered([texts[i % len(texts)] for i in range(longest) for texts in by_task.values()])


def _geneval(rest: str, field: str, strict: bool) -> Gathered:
    del strict
    split, seed = geneval.asked(rest, field)
    return Gathered(list(geneval.splits(seed)[split]))


def _check_tfds(rest: str, field: str) -> None:
    if rest.count(":") < 2:
        raise UserError(f'{field}: got "tfds:{rest}", wanted tfds:NAME:SPLIT:FIELD')


def _tfds(rest: str, field: str, strict: bool) -> Gathered:
    _check_tfds(rest, field)
    name, split, text = rest.rsplit(":", 2)
    return builders.read(name, split, text, field, strict)


class Source(NamedTuple):
    """How a kind of source is checked (rest, field) and read (rest, field, strict)."""

    check: Callable[[str, str], object]
    read: Callable[[str, str, bool], Gathered]


READERS: dict[str, Source] = {
    "shapes": Source(_shapes_split, _shapes),
    "geneval": Source(geneval.asked, _geneval),
    "tfds": Source(_check_tfds, _tfds),
}
SOURCES = "shapes:SPLIT, geneval:SPLIT, tfds:NAME:SPLIT:FIELD"


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
