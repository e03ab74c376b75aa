"""Prompts out of lines and records that others wrote: what is taken, what is skipped, and why.

A line is a prompt, or a JSON object with `prompt`, `negative_prompt` and `metadata`. Nothing here trusts
its input: docs/prompts.md lists what happens to which line. A bad line is skipped and counted, or with
`strict` ends the reading.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import NO_METADATA, Prompt

LONGEST = 65_536
"""Characters of a line: room for any prompt with its metadata, none for a file without line ends."""

DEEPEST = 64
"""Levels of a JSON line; far below what makes json itself give up."""

SHOWN = 3
"""Numbers of bad lines that are named for each reason."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SIMPLE = re.compile(r'\{"prompt": ?"([^"\\]*)"\}\s*')
"""A line with nothing but a prompt, without escapes."""

OUTSIDE = frozenset({"negative_prompt", "metadata"})
KNOWN = OUTSIDE | {"prompt"}

FOREIGN: Mapping[bytes, str] = {
    b"\xff\xfe\x00\x00": "UTF-32, wanted UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32, wanted UTF-8",
    b"\xff\xfe": "UTF-16, wanted UTF-8",
    b"\xfe\xff": "UTF-16, wanted UTF-8",
    b"\x1f\x8b": "compressed (gzip), wanted plain text: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed (zstd), wanted plain text: unpack it first",
    b"\xfd7zXZ\x00": "compressed (xz), wanted plain text: unpack it first",
    b"PK\x03\x04": "a zip archive, wanted plain text: unpack it first",
    b"PAR1": "a Parquet file, wanted text or JSON lines",
}
"""How files begin that no line of can be read; the longer beginning first."""

Entry = TypeVar("Entry")


class Bad(Exception):
    """Why a line is skipped."""


@dataclasses.dataclass
class Gathered:
    """The prompts of a source in order, and what was left out of them."""

    prompts: list[str]
    entries: int = 0
    repeats: int = 0
    bad: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """How many lines were bad."""
        return sum(self.counts.values())

    def report(self, unit: str) -> str:
        """One line on what was left out; empty where nothing was."""
        parts = []
        if self.skipped:
            reasons = "; ".join(self._reason(reason, unit) for reason in self.counts)
            parts.append(f"skipped {self.skipped:,} of {self.entries:,} {unit}s ({reasons})")
        if self.repeats:
            parts.append(
                f"left out {self.repeats:,} repeat{'s' if self.repeats > 1 else ''} of earlier prompts"
            )
        return ", ".join(parts)

    def _reason(self, reason: str, unit: str) -> str:
        count, first = self.counts[reason], self.bad[reason]
        numbers = ", ".join(str(number) for number in first) + (" …" if count > len(first) else "")
        return f"{count:,} {reason}: {unit}{'s' if count > 1 else ''} {numbers}"


def gather(
    entries: Iterable[Entry], read: Callable[[Entry], str | None], where: str, unit: str, strict: bool
) -> Gathered:
    """Read every entry (None: blank, no prompt and no mistake); the first of equal texts stands."""
    found: dict[str, None] = {}
    result, taken, number = Gathered([]), 0, 0
    for number, entry in enumerate(entries, 1):
        try:
            prompt = read(entry)
        except Bad as error:
            reason = str(error)
            if strict:
                raise UserError(f"{where} {unit} {number} is {reason}") from None
            result.counts[reason] = result.counts.get(reason, 0) + 1
            if result.counts[reason] <= SHOWN:
                result.bad.setdefault(reason, []).append(number)
            continue
        if prompt is not None:
            taken += 1
            found.setdefault(prompt)
    result.prompts, result.entries, result.repeats = list(found), number, taken - len(found)
    return result


def read_file(path: str, field: str, strict: bool) -> Gathered:
    """The prompts of a file; by its suffix JSON lines, or one prompt per line."""
    json_lines = Path(path).suffix.lower() in JSON_SUFFIXES
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{field}: {path} is no file")
        refuse_foreign(path, field, json_lines)
        # bytes that are not UTF-8 come as lone surrogates, which are found line by line
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            read = json_prompt if json_lines else text_prompt
            return gather(lines, read, f"{field}: {path}", "line", strict)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {path}: {getattr(error, 'strerror', None) or error}") from None


def refuse_foreign(path: str, field: str, json_lines: bool) -> None:
    """UserError for a file that is something else than lines of UTF-8."""
    with open(path, "rb") as file:
        head = file.read(256)
    for magic, name in FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{field}: {path} is {name}")
    if json_lines and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise UserError(f"{field}: {path} is a JSON array, wanted one object per line")


def text_prompt(line: str) -> str | None:
    """A line as a prompt."""
    if len(line) <= LONGEST and plain(text := line.strip()):
        return text or None
    return clean(checked(line)) or None


def json_prompt(line: str) -> str | None:
    """A line as a JSON object with a prompt."""
    simple = SIMPLE.fullmatch(line)
    if simple and len(line) <= LONGEST and plain(text := simple[1].strip()) and text:
        return text  # most lines of a large file are such, and json takes five times as long
    line = checked(line).strip()
    return record_prompt(json_object(line), line) if line else None


def json_object(words: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        record, end = DECODER.raw_decode(words)
    except (ValueError, RecursionError):
        raise Bad("no JSON") from None
    if end != len(words):
        raise Bad("no JSON")
    if words.count("{") + words.count("[") > DEEPEST and depth(record) > DEEPEST:
        raise Bad(f"nested deeper than {DEEPEST}")
    if not isinstance(record, dict):
        raise Bad("no JSON object")
    return record


def record_prompt(record: dict[str, Any], line: str = "") -> str:
    """The prompt of a record; its metadata stay in `line`, if it was one, until they are read."""
    words = record.get("prompt")
    if not isinstance(words, str):
        raise Bad('without a "prompt" that is text')
    text = clean(words)
    if not text:
        raise Bad("without a word in its prompt")
    if len(record) == 1:
        return text
    negative = record.get("negative_prompt")
    if not (negative is None or isinstance(negative, str)):
        raise Bad("with a negative_prompt that is no text")
    given = record.get("metadata")
    if not (given is None or isinstance(given, dict)):
        raise Bad("with metadata that are no object")
    if negative is None and not given and record.keys() <= KNOWN:
        return text
    kept = Stored(line) if line else record_metadata(record) or NO_METADATA
    return Prompt(text, kept, None if negative is None else clean(negative))


def record_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says beside its prompts. Further keys are metadata, and then the prompt is too, as in
    GenEval's files."""
    further = {}
    if not record.keys() <= KNOWN:
        further = {k: v for k, v in record.items() if k not in OUTSIDE}
    return further | (record.get("metadata") or {})


class Stored(Mapping[str, Any]):
    """Metadata that stay the JSON line they came in until they are read: so a million fit into memory."""

    __slots__ = ("line",)

    def __init__(self, line: str) -> None:
        self.line = line

    def _read(self) -> dict[str, Any]:
        return record_metadata(json.loads(self.line))

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())


def checked(line: str) -> str:
    """The line, if it is not too long and all of its bytes are UTF-8; without a byte order mark, which
    also stands inside of files that were joined."""
    if len(line) > LONGEST:
        raise Bad(f"longer than {LONGEST:,} characters")
    if line.isascii():
        return line
    try:
        line.encode()
    except UnicodeEncodeError:
        raise Bad("not UTF-8") from None
    return line.lstrip("\ufeff")


def clean(words: str) -> str:
    """One space for any white space. Joiners and marks of writing systems stay; control characters and
    halves of characters do not pass."""
    if plain(words):
        return words.strip()
    text = " ".join(words.split())
    if not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise Bad("with control characters")
    return text


def plain(text: str) -> bool:
    """Nothing to mend or to refuse, which is fast to see: printable text has no white space but spaces, no
    halves of characters and no byte order mark."""
    return text.isprintable() and "  " not in text


def depth(value: Any) -> int:
    """Levels of a JSON value, without recursion."""
    level, layer = 0, [value]
    while layer:
        level += 1
        layer = [child for node in layer for child in children(node)]
    return level


def children(node: Any) -> Iterator[Any]:
    """What a JSON value directly holds, where that is again an array or an object."""
    held = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return (child for child in held if isinstance(child, dict | list))


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large")
    return value


DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_finite)
"""JSON as it is defined: without NaN, and without numbers that only infinity can stand for."""
