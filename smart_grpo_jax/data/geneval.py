"""GenEval's prompts: the grammar of its six tasks, read both ways, and the sets that a run trains and is
judged on.

    single_object   a photo of a bench
    two_object      a photo of a bench and a sports ball
    counting        a photo of three clocks
    colors          a photo of a red car
    position        a photo of a dog right of a teddy bear
    color_attr      a photo of a purple wine glass and a black apple

Every task is a numbered list: `nth(task, n)` is its n-th prompt, so that a draw is one integer. Integers
come from SHA-256 of "seed task counter" and from nothing else: no library's generator, no float, no hash
of Python's own, no order of a set. They are equal on every machine and in every version.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smart_grpo_jax.core.errors import StorageError, UserError, nearest
from smart_grpo_jax.core.types import Prompt, metadata_of
from smart_grpo_jax.data.geneval_words import (
    CLASSES,
    COLOURS,
    COUNTS,
    PEOPLE,
    PLURALS,
    RELATIONS,
    plain_plural,
)
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.progress import say

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OPENING = "a photo of "
OBJECTS = tuple(name for name in CLASSES if name not in PEOPLE)
"""What may have a colour: GenEval paints no person."""

SEED = 0

SHARES: Mapping[str, Mapping[str, int]] = {
    "train": dict(zip(TASKS, (54, 666, 162, 486, 666, 666), strict=True)),
    "heldout": dict(zip(TASKS, (6, 74, 18, 54, 74, 74), strict=True)),
    "eval": dict(zip(TASKS, (20, 240, 60, 180, 250, 250), strict=True)),
}
"""Prompts of each task: 2,700, 300 and 1,000 in all. Two tasks are small: single_object has 80 prompts and
counting 240, all of which are given out, a quarter of them to `eval`. The other tasks share the rest."""


@dataclasses.dataclass(frozen=True)
class Clause:
    """`count` objects of a class, in a colour where one is said."""

    name: str
    colour: str | None = None
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a prompt asks for: one clause, or two that are joined by "and" or by a relation."""

    task: str
    clauses: tuple[Clause, ...]
    relation: str | None = None


def text(meaning: Meaning) -> str:
    """The prompt as words."""
    return OPENING + f" {meaning.relation or 'and'} ".join(map(_clause_text, meaning.clauses))


def _clause_text(clause: Clause) -> str:
    if clause.count > 1:
        return f"{COUNTS[clause.count]} {PLURALS[clause.name]}"
    words = f"{clause.colour} {clause.name}" if clause.colour else clause.name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def parse(prompt: str) -> Meaning:
    """The meaning of a text, also in the published spelling of its plurals ("knifes", "sheeps"); case and
    white space do not matter. UserError outside the grammar."""
    words = " ".join(prompt.lower().split())
    relation = next((r for r in ("and", *RELATIONS) if f" {r} " in words), None)
    parts = words.removeprefix(OPENING).split(f" {relation} ") if relation else [words.removeprefix(OPENING)]
    clauses = tuple(_clauses().get(part) for part in parts)
    known = tuple(clause for clause in clauses if clause is not None)
    if not words.startswith(OPENING) or len(known) != len(clauses) or len(clauses) > 2:
        raise UserError(f'prompt: got "{prompt[:80]}", wanted one of the six forms of GenEval')
    meaning = Meaning(_task(known, relation), known, None if relation == "and" else relation)
    if not _sound(meaning):
        raise UserError(f'prompt: got "{prompt[:80]}", which no task of GenEval asks for')
    return meaning


@functools.cache
def _clauses() -> dict[str, Clause]:
    """Every clause by its words."""
    counted = [Clause(name, count=n) for name in CLASSES for n in COUNTS]
    plain = [Clause(name, colour) for name in CLASSES for colour in (None, *COLOURS)]
    published = {f"{COUNTS[c.count]} {plain_plural(c.name)}": c for c in counted}
    return published | {_clause_text(clause): clause for clause in (*plain, *counted)}


def _task(clauses: Sequence[Clause], relation: str | None) -> str:
    coloured = clauses[0].colour is not None
    if len(clauses) == 1:
        return "counting" if clauses[0].count > 1 else "colors" if coloured else "single_object"
    if relation != "and":
        return "position"
    return "color_attr" if coloured else "two_object"


def _sound(meaning: Meaning) -> bool:
    """Is it in the list of its task? Two objects differ in class and in colour; people have no colour."""
    one, *other = meaning.clauses
    colours = {clause.colour for clause in meaning.clauses}
    painted = any(clause.colour and clause.name in PEOPLE for clause in meaning.clauses)
    if painted or not other:
        return not painted
    apart = one.name != other[0].name and one.count == other[0].count == 1
    return apart and (
        None not in colours and len(colours) == 2 if meaning.task == "color_attr" else colours == {None}
    )


def metadata(meaning: Meaning) -> dict[str, Any]:
    """GenEval's own record of a prompt, as its detector reads it.

    In a position prompt the object that the other one is placed by comes first, and the placed one points
    to it with [relation, 0].
    """
    include: list[dict[str, Any]] = []
    for clause in meaning.clauses[::-1] if meaning.relation else meaning.clauses:
        colour = {"color": clause.colour} if clause.colour else {}
        include.append({"class": clause.name, "count": clause.count, **colour})
    record: dict[str, Any] = {"tag": meaning.task, "include": include}
    if meaning.relation:
        include[1]["position"] = [meaning.relation, 0]
    if meaning.task == "counting":
        (clause,) = meaning.clauses
        record["exclude"] = [{"class": clause.name, "count": clause.count + 1}]
    return {**record, "prompt": text(meaning)}


def prompt(meaning: Meaning) -> Prompt:
    """The text, carrying its metadata."""
    return Prompt(text(meaning), metadata(meaning))


def _pair(number: int, names: Sequence[str]) -> tuple[str, str]:
    """The `number`-th of the n (n - 1) ordered pairs of two different names."""
    first, second = divmod(number, len(names) - 1)
    return names[first], names[second + (second >= first)]


def _two_object(number: int) -> Meaning:
    one, other = _pair(number, CLASSES)
    return Meaning("two_object", (Clause(one), Clause(other)))


def _counting(number: int) -> Meaning:
    name, count = divmod(number, len(COUNTS))
    return Meaning("counting", (Clause(CLASSES[name], count=list(COUNTS)[count]),))


def _colors(number: int) -> Meaning:
    name, colour = divmod(number, len(COLOURS))
    return Meaning("colors", (Clause(OBJECTS[name], COLOURS[colour]),))


def _position(number: int) -> Meaning:
    pair, relation = divmod(number, len(RELATIONS))
    one, other = _pair(pair, CLASSES)
    return Meaning("position", (Clause(one), Clause(other)), list(RELATIONS)[relation])


def _color_attr(number: int) -> Meaning:
    names, colours = divmod(number, len(COLOURS) * (len(COLOURS) - 1))
    (one, other), (first, second) = _pair(names, OBJECTS), _pair(colours, COLOURS)
    return Meaning("color_attr", (Clause(one, first), Clause(other, second)))


NUMBERED: Mapping[str, tuple[int, Callable[[int], Meaning]]] = {
    "single_object": (80, lambda number: Meaning("single_object", (Clause(CLASSES[number]),))),
    "two_object": (80 * 79, _two_object),
    "counting": (80 * 3, _counting),
    "colors": (79 * 10, _colors),
    "position": (80 * 79 * 4, _position),
    "color_attr": (79 * 78 * 10 * 9, _color_attr),
}
"""How many prompts a task has, and how to say the n-th: 587,290 in all."""


def nth(task: str, number: int) -> Meaning:
    """The `number`-th prompt of a task."""
    return NUMBERED[task][1](number)


def same(meaning: Meaning) -> tuple[Any, ...]:
    """Equal for prompts that ask for the same: "A and B" and "B and A", "A left of B" and "B right of A"."""
    clauses = tuple((clause.name, clause.colour or "", clause.count) for clause in meaning.clauses)
    relation = meaning.relation or ""
    turned = clauses[::-1], RELATIONS.get(relation, "")
    return (meaning.task, *min((clauses, relation), turned))


def _number(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode()).digest(), "big")


def draws(task: str, seed: int) -> Iterator[Meaning]:
    """The prompts of a task in random order, each meaning once, in one of its wordings."""
    size, one = NUMBERED[task]
    seen: set[tuple[Any, ...]] = set()
    counter = 0
    while True:
        meaning = one(_number(f"{seed} {task} {counter}") % size)
        counter += 1
        if (key := same(meaning)) not in seen:
            seen.add(key)
            yield meaning


@functools.cache
def splits(seed: int = SEED) -> Mapping[str, tuple[Prompt, ...]]:
    """`train` (2,700), `heldout` (300) and `eval` (1,000): no meaning twice, neither inside a split nor in
    two of them. Each is in the order of a hash, so that a part of it holds the tasks in their shares."""
    found: dict[str, list[Prompt]] = {name: [] for name in SHARES}
    for task in TASKS:
        stream = draws(task, seed)
        for name, shares in SHARES.items():
            found[name] += [prompt(next(stream)) for _ in range(shares[task])]
    return {name: tuple(sorted(part, key=lambda p: _number(f"{seed} {p}"))) for name, part in found.items()}


def asked(rest: str, field: str = "prompts.source") -> tuple[str, int]:
    """Split and seed of `SPLIT` or `SPLIT?seed=N`."""
    name, given, option = rest.partition("?")
    word, _, number = option.partition("=")
    if name not in SHARES:
        raise UserError(f'{field}: got "geneval:{rest}" ({nearest(name, SHARES)})')
    if given and not (word == "seed" and number.isascii() and number.isdigit() and len(number) < 20):
        raise UserError(f'{field}: got "geneval:{rest}", wanted geneval:{name}?seed=N with a number')
    return name, int(number) if given else SEED


def jsonl(prompts: Sequence[str]) -> str:
    """GenEval's format: one record per line."""
    return "".join(json.dumps(dict(metadata_of(prompt)), ensure_ascii=False) + "\n" for prompt in prompts)


def write(folder: Path, seed: int = SEED) -> list[Path]:
    """Every split as SPLIT.txt (the prompts) and SPLIT.jsonl (the records)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: could not be made ({error.strerror})") from error
    files = {}
    for name, prompts in splits(seed).items():
        files[folder / f"{name}.txt"] = "".join(f"{p}\n" for p in prompts)
        files[folder / f"{name}.jsonl"] = jsonl(prompts)
    for file, content in files.items():
        write_atomic(file, content)
    return list(files)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command that writes the splits as files."""
    parser = argparse.ArgumentParser(prog="python -m smart_grpo_jax.data.geneval", description=main.__doc__)
    parser.add_argument("--out", required=True, help="folder for SPLIT.txt and SPLIT.jsonl")
    parser.add_argument("--seed", type=int, default=SEED, help="another draw of the same shares")
    given = parser.parse_args(arguments)
    try:
        for file in write(Path(given.out), given.seed):
            say(str(file))
    except UserError as error:
        print(f"geneval: {error.line}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
