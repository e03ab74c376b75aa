"""spiece.model: SentencePiece's file, a protobuf, read without either library.

    ModelProto      1 pieces (repeated)   2 trainer   3 normaliser
    piece           1 text   2 score (float)   3 type (1 normal, 2 unknown, 3 control, 4 by the user, …)
    trainer         3 model type (1 unigram)   40 id of the unknown piece
    normaliser      2 table

Fields come in this order, so that a file that was cut short lacks its normaliser.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from smart_grpo_jax.hub.unigram import UNKNOWN, Broken, Unigram

LARGEST = 1 << 26
"""Bytes; T5's own file has 0.8 million."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
NORMAL, CONTROL, BY_USER = 1, 3, 4
UNIGRAM = 1


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int


def read(path: Path) -> Unigram:
    """The model of a file; what it cannot be read as is a ValueError."""
    if path.stat().st_size > LARGEST:
        raise Broken(f"{path.stat().st_size} bytes, at most {LARGEST} wanted")
    pieces, charsmap = parse(path.read_bytes())
    whole = [piece.text for piece in pieces if piece.kind in (CONTROL, BY_USER)]
    return Unigram([(piece.text, piece.score) for piece in pieces], charsmap, whole)


def parse(data: bytes) -> tuple[list[Piece], bytes]:
    """The pieces and the normaliser's table."""
    pieces: list[Piece] = []
    trainer = normaliser = None
    for number, value in fields(data):
        if number == 1:
            pieces.append(parse_piece(nested(value)))
        elif number == 2:
            trainer = dict(fields(nested(value)))
        elif number == 3:
            normaliser = dict(fields(nested(value)))
    if not pieces or trainer is None or normaliser is None:
        raise Broken("it lacks its pieces, trainer or normaliser; has it been cut short?")
    kind, unknown = trainer.get(3, UNIGRAM), trainer.get(40, 0)
    if (kind, unknown) != (UNIGRAM, UNKNOWN):
        raise Broken(f"model type {kind}, unknown piece {unknown}: wanted {UNIGRAM} and {UNKNOWN}")
    return pieces, nested(normaliser.get(2, b""))


def parse_piece(data: bytes) -> Piece:
    """One piece; scores are float32."""
    entry = dict(fields(data))
    score, kind = entry.get(2, bytes(4)), entry.get(3, NORMAL)
    if not isinstance(kind, int) or not isinstance(score, bytes) or len(score) != 4:
        raise Broken("a piece has fields of the wrong type")
    return Piece(nested(entry.get(1, b"")).decode(), struct.unpack("<f", score)[0], kind)


def nested(value: int | bytes) -> bytes:
    """A field that must be a string of bytes."""
    if not isinstance(value, bytes):
        raise Broken("a number where bytes belong")
    return value


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: varints as numbers, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = varint(data, at)
            yield key >> 3, value
            continue
        if wire == BYTES:
            length, at = varint(data, at)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise Broken(f"wire type {wire} at byte {at}")
        if length > len(data) - at:
            raise Broken(f"a field of {length} bytes where {len(data) - at} are left")
        yield key >> 3, data[at : at + length]
        at += length


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first; and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Broken("it ends inside a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise Broken(f"a number of more than 10 bytes at byte {at}")
