"""T5's tokenizer as a pipeline of the `tokenizers` library, from its pieces and its normaliser's table.

The pipeline is transformers': the table, words at white space, "▁" before each, the best segmentation by
score, `</s>`. What a tokenizer.json says of its own pipeline is not read, as transformers 5 does not
either; files of older versions differ from it in one character (U+0085 is white space here).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FIRST = ("<pad>", "</s>", "<unk>")
"""The first pieces of every T5; their places are the ids."""

PAD, END, UNKNOWN = range(3)

DEEPEST = 64
"""Bytes of the longest sequence that a normaliser's table replaces (in T5's own: 18)."""


class Broken(ValueError):
    """What makes a file no tokenizer of T5; the reader puts the file's name before it."""


class Unigram(NamedTuple):
    """Pieces with their scores, in the order of their ids; the table (empty: no normalisation); and the
    pieces that are matched whole, before the text is normalised."""

    pieces: Sequence[tuple[str, float]]
    charsmap: bytes
    whole: Sequence[str] = ()


def pipeline(model: Unigram, tokens: Sequence[Mapping[str, Any]]) -> Any:
    """The `tokenizers.Tokenizer`; `tokens` are cut out of the text before anything else."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    check(model)
    backend = Tokenizer(models.Unigram(list(model.pieces), unk_id=UNKNOWN, byte_fallback=False))
    if model.charsmap:
        backend.normalizer = normalizers.Precompiled(model.charsmap)
    words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", FIRST[END]], special_tokens=[(FIRST[END], END)]
    )
    backend.add_tokens([AddedToken(**token) for token in tokens])
    return backend


def check(model: Unigram) -> None:
    """What the library takes for granted: an empty piece would keep its search in place for ever, and a
    reference to outside of the table would end the process."""
    names = tuple(piece for piece, _ in model.pieces[: len(FIRST)])
    if names != FIRST:
        raise Broken(f"the first pieces: got {names}, wanted {FIRST}")
    for index, (piece, score) in enumerate(model.pieces):
        if not piece or not math.isfinite(score):
            raise Broken(f"piece {index}: got {piece!r} with score {score}")
    if model.charsmap:
        check_charsmap(model.charsmap)


def check_charsmap(table: bytes) -> None:
    """Follow every path through the table: a double-array trie, then the texts that its leaves point to.

    The size of the trie in bytes (4 bytes), its units (4 bytes each), the texts, each ended by a zero.
    A unit at place i has the byte that leads to it (its label) and a distance, i ^ distance = base; the
    units below it are at base ^ byte, and if it ends a sequence, the unit at its base holds the text's
    place. So the unit at i can only be below a unit whose base is i ^ label.
    """
    size = int.from_bytes(table[:4], "little")
    if size % 4 or not 1024 <= size <= len(table) - 4:
        raise Broken(f"the normaliser's table: its trie has {size} bytes of {len(table)}")
    units = np.frombuffer(table, "<u4", size // 4, 4).astype(np.int64)
    place, label = np.arange(len(units)), units & 0x800000FF
    base = place ^ ((units >> 10) << ((units & 0x200) >> 6))
    above = np.where((label > 0) & (label < 256), place ^ label, len(units))
    above = np.minimum(above, len(units))
    reached, new = place == 0, np.array([0])
    for _ in range(DEEPEST):
        if ((base[new] | 255) >= len(units)).any():
            raise Broken("the normaliser's table: its trie points to outside of itself")
        open_bases = np.zeros(len(units) + 1, bool)
        open_bases[base[new]] = True
        new = np.flatnonzero(open_bases[above] & ~reached)
        reached[new] = True
        if not len(new):
            break
    else:
        raise Broken(f"the normaliser's table: its trie is deeper than {DEEPEST}")
    texts = table[4 + size :]
    texts.decode()
    begins = np.append((np.frombuffer(texts, np.uint8) & 0xC0) != 0x80, True)
    ends = reached & (units & 0x100 != 0) & (place > 0)
    found = units[base[ends]] & 0x7FFFFFFF
    if (found > len(texts)).any() or not begins[found].all():
        raise Broken("the normaliser's table: it points to outside of its texts")
