"""The prompts of the shapes world: text, meaning and number rows, and how they are split.

Six task families, the six of GenEval, over 6 colours and 4 shapes:

    single_object   a photo of a cross
    two_object      a photo of a circle and a square
    counting        a photo of three red squares
    colors          a photo of a red circle
    position        a photo of a red circle left of a green square
    color_attr      a photo of a red circle and a green square

A prompt has three equal forms: its text, a `Prompt`, and a row of seven integers
(task, count, colour1, shape1, colour2, shape2, relation; -1 where nothing is said) for use in graphs.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from smart_grpo_jax.core.errors import UserError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("a", "two", "three", "four")
SPEC_FIELDS = ("task", "count", "colour1", "shape1", "colour2", "shape2", "relation")
UNSAID = -1

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
OPENING = ("a", "photo", "of")
LONGEST = 11
"""Words in the longest prompt."""

WORDS = (
    *OPENING,
    *COUNTS[1:],
    *COLOURS,
    *SHAPES,
    *PLURALS.values(),
    "and",
    "left",
    "right",
    "above",
    "below",
)
"""Every word of the grammar, in a fixed order: the vocabulary of a word-level tokenizer."""


@dataclasses.dataclass(frozen=True)
class Clause:
    """`count` objects of one shape, in one colour where a colour is said."""

    shape: str
    colour: str | None = None
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a prompt asks for: one clause, or two that are joined by "and" or by a relation."""

    task: str
    clauses: tuple[Clause, ...]
    relation: str | None = None


def text(prompt: Prompt) -> str:
    """The prompt as words."""
    joiner = f" {prompt.relation or 'and'} "
    return "a photo of " + joiner.join(_clause_text(clause) for clause in prompt.clauses)


def _clause_text(clause: Clause) -> str:
    noun = clause.shape if clause.count == 1 else PLURALS[clause.shape]
    return " ".join(filter(None, (COUNTS[clause.count - 1], clause.colour, noun)))


@functools.cache
def _by_text() -> dict[str, Prompt]:
    return {text(prompt): prompt for prompt in all_prompts()}


def parse(prompt: str) -> Prompt:
    """The meaning of a text; case and white space do not matter. UserError outside the grammar."""
    words = prompt.lower().split()
    found = _by_text().get(" ".join(words))
    if found is not None:
        return found
    for word in words:
        if word not in WORDS:
            similar = difflib.get_close_matches(word, WORDS, n=1, cutoff=0.75)
            hint = f'try "{similar[0]}"' if similar else _nearest_text(words)
            raise UserError(f'prompt: got unknown word "{word}" in "{prompt}" ({hint})')
    raise UserError(
        f'prompt: got "{prompt}", want one of the six forms of the shapes world ({_nearest_text(words)})'
    )


def _nearest_text(words: Sequence[str]) -> str:
    """The prompt of the grammar that shares the most words, so that the hint stays on the subject."""
    best = max(_by_text(), key=lambda known: (_shared(words, known.split()), -len(known)))
    return f'try "{best}"'


def _shared(words: Sequence[str], known: Sequence[str]) -> float:
    common = sum(min(words.count(word), known.count(word)) for word in set(words))
    return common / max(len(words), len(known))


@functools.cache
def all_prompts() -> tuple[Prompt, ...]:
    """The whole grammar: 4 + 12 + 72 + 24 + 1,920 + 480 = 2,512 prompts.

    The two objects of a prompt always differ in what is said of them: in shape where no colour is
    said, else in colour (the only way in which a swapped binding can be seen).
    """
    kinds = [Clause(shape, colour) for colour in COLOURS for shape in SHAPES]
    pairs = [(a, b) for a, b in itertools.product(kinds, kinds) if a.colour != b.colour]
    shapes = [Clause(shape) for shape in SHAPES]
    counted = [dataclasses.replace(kind, count=count) for count in (2, 3, 4) for kind in kinds]
    return (
        *(Prompt("single_object", (a,)) for a in shapes),
        *(Prompt("two_object", pair) for pair in itertools.permutations(shapes, 2)),
        *(Prompt("counting", (a,)) for a in counted),
        *(Prompt("colors", (a,)) for a in kinds),
        *(Prompt("position", pair, relation) for pair in pairs for relation in RELATIONS),
        *(Prompt("color_attr", pair) for pair in pairs),
    )


def _index(names: Sequence[str], name: str | None) -> int:
    return UNSAID if name is None else names.index(name)


def _row(prompt: Prompt) -> list[int]:
    first = prompt.clauses[0]
    second = prompt.clauses[1] if len(prompt.clauses) == 2 else None
    return [
        TASKS.index(prompt.task),
        first.count,
        _index(COLOURS, first.colour),
        _index(SHAPES, first.shape),
        _index(COLOURS, second.colour) if second else UNSAID,
        _index(SHAPES, second.shape) if second else UNSAID,
        _index(RELATIONS, prompt.relation),
    ]


def encode(prompts: Sequence[str]) -> np.ndarray:
    """Texts as number rows, int32[n, 7] in the order of `SPEC_FIELDS`; `count` is the first clause's."""
    return np.asarray([_row(parse(prompt)) for prompt in prompts], np.int32).reshape(-1, len(SPEC_FIELDS))


@functools.cache
def _by_row() -> dict[tuple[int, ...], str]:
    return {tuple(_row(prompt)): text(prompt) for prompt in all_prompts()}


def texts(spec: np.ndarray) -> list[str]:
    """Number rows [n, 7] as texts: the inverse of `encode`."""
    rows = [tuple(int(value) for value in row) for row in np.asarray(spec)]
    for row in rows:
        if row not in _by_row():
            raise UserError(f"spec: got {row}, want a row of the grammar {SPEC_FIELDS}")
    return [_by_row()[row] for row in rows]


HELD_OUT = frozenset(
    frozenset(pair)
    for pair in (
        ("red", "triangle"),
        ("green", "cross"),
        ("blue", "circle"),
        ("yellow", "square"),
        ("triangle", "cross"),
        ("alone", "cross"),
    )
)
"""Combinations that no prompt of the train split contains: a colour on a shape, two shapes in one
picture, and (there are only four prompts for it) a shape without any other word."""

HELD_OUT_SHARE = 0.15
"""Part of each task's other prompts that forms the `heldout` split; at least one meaning per task."""


def bindings(prompt: Prompt) -> frozenset[frozenset[str]]:
    """The attribute combinations in a prompt, in the terms of `HELD_OUT`."""
    found = [{clause.colour, clause.shape} for clause in prompt.clauses if clause.colour]
    if len(prompt.clauses) == 2:
        found.append({clause.shape for clause in prompt.clauses})
    elif not prompt.clauses[0].colour:
        found.append({"alone", prompt.clauses[0].shape})
    return frozenset(frozenset(pair) for pair in found)


def meaning(prompt: Prompt) -> str:
    """One text for all prompts that ask for the same: "A and B" is "B and A", "A left of B" is
    "B right of A". Splits keep equal meanings together, else the mirror of a test prompt is trained on."""
    if len(prompt.clauses) == 1:
        return text(prompt)
    opposite: dict[str, str] = {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
    }
    mirror = dataclasses.replace(
        prompt,
        clauses=prompt.clauses[::-1],
        relation=opposite[prompt.relation] if prompt.relation else None,
    )
    return min(text(prompt), text(mirror))


def _rank(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()


@functools.cache
def _split_texts() -> dict[str, tuple[str, ...]]:
    prompts = all_prompts()
    combined = [prompt for prompt in prompts if bindings(prompt) & HELD_OUT]
    plain = [prompt for prompt in prompts if not bindings(prompt) & HELD_OUT]
    unseen: set[str] = set()
    for task in TASKS:
        meanings = sorted({meaning(prompt) for prompt in plain if prompt.task == task}, key=_rank)
        unseen.update(meanings[: max(1, round(HELD_OUT_SHARE * len(meanings)))])
    parts = {
        "train": [prompt for prompt in plain if meaning(prompt) not in unseen],
        "heldout": [prompt for prompt in plain if meaning(prompt) in unseen],
        "combinations": combined,
    }
    return {name: tuple(sorted((text(p) for p in part), key=_rank)) for name, part in parts.items()}


def splits() -> dict[str, list[str]]:
    """The grammar as three disjoint lists of texts: `train`, `heldout`, `combinations`.

    `combinations` holds every prompt with a combination of `HELD_OUT`; `heldout` a share of the rest,
    chosen per task by the hash of the meaning: unseen prompts made of seen combinations. Each list holds
    all six tasks and is in the order of a hash, so a prefix of it is a random sample. Tasks differ in
    size (one or two prompts of single_object and two_object outside train, hundreds of position):
    weigh by task, and use several seeds for the small ones.
    """
    return {name: list(part) for name, part in _split_texts().items()}
