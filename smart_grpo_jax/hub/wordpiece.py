"""The tokenizer of BERT as BLIP uses it, on the light `tokenizers` library, id for id that of transformers.

Lower case, accents off, Chinese characters apart, control characters out; then the longest piece that fits.
BLIP adds two tokens behind the vocabulary, [DEC] and [ENC]; ImageReward never writes them, but its embedding
has rows for them, and a prompt that spells one out gets it.

A folder holds vocab.txt, or a tokenizer.json with the vocabulary inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.tokenizers import LONGEST, read_json

BLIP_LENGTH = 35
BLIP_TOKENS = ("[DEC]", "[ENC]")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LARGEST = 16 * 2**20
"""Bytes of the longest vocab.txt; BERT's has 230 kB."""


@dataclasses.dataclass(frozen=True)
class WordPiece:
    """Prompts → ids and mask [n, length], begun with [CLS], ended with [SEP], also when cut."""

    backend: Any
    length: int
    pad: int

    def __call__(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n s"], Int[np.ndarray, "n s"]]:
        """(ids, mask): the mask is 1 on tokens and 0 on padding."""
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        mask = np.zeros_like(ids)
        for row, seen, encoding in zip(ids, mask, self.backend.encode_batch(list(texts)), strict=True):
            row[: len(encoding.ids)] = encoding.ids
            seen[: len(encoding.ids)] = 1
        return ids, mask

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts lose pieces to the length."""
        return sum(bool(encoding.overflowing) for encoding in self.backend.encode_batch(list(texts)))

    @property
    def size(self) -> int:
        """Rows that an embedding needs: the vocabulary and the added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=True)


def load_wordpiece(folder: Path, length: int = BLIP_LENGTH, extra: Sequence[str] = BLIP_TOKENS) -> WordPiece:
    """The tokenizer of a folder; the `extra` tokens get the ids behind its vocabulary."""
    if not 2 < length <= LONGEST:
        raise UserError(f"{folder}: length: got {length}, wanted 3 to {LONGEST}")
    vocab = vocabulary(folder)
    for token in SPECIAL[:4]:
        if token not in vocab:
            raise UserError(f"{folder}: the vocabulary lacks {token!r}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{folder}: the ids of the vocabulary are not 0 to {len(vocab) - 1}")
    try:
        backend = bert(vocab, [*(token for token in SPECIAL if token in vocab), *extra])
    except Exception as error:  # whatever a foreign vocabulary leads to in the library
        raise UserError(f"{folder}: not a vocabulary of BERT ({error})") from error
    for number, token in enumerate((token for token in extra if token not in vocab), len(vocab)):
        if (got := backend.token_to_id(token)) != number:
            raise UserError(f"{folder}: {token!r} has id {got}, wanted {number}")
    backend.enable_truncation(length)
    return WordPiece(backend, length, vocab["[PAD]"])


def bert(vocab: dict[str, int], whole: Sequence[str]) -> Any:
    """Pipeline of bert-base-uncased; the tokens of `whole` are matched as they stand."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocab[token]) for token in ("[SEP]", "[CLS]")]
    backend.post_processor = processors.BertProcessing(*ends)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in whole])
    return backend


def vocabulary(folder: Path) -> dict[str, int]:
    """Piece → id of an uncased vocabulary."""
    folder = Path(folder)
    if read_json(folder, "tokenizer_config.json").get("do_lower_case", True) is not True:
        raise UserError(f"{folder}: do_lower_case is off, wanted an uncased tokenizer")
    path = folder / "vocab.txt"
    if path.is_file():
        return lines_of(path)
    model = read_json(folder, "tokenizer.json").get("model")
    vocab = model.get("vocab") if isinstance(model, dict) and model.get("type") == "WordPiece" else None
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise UserError(f"{folder}: wanted vocab.txt, or a tokenizer.json with a WordPiece vocabulary")
    return vocab


def lines_of(path: Path) -> dict[str, int]:
    """One piece a line; its id is the number of the line, from 0."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: got {path.stat().st_size} bytes, wanted at most {LARGEST}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    pieces = text.removesuffix("\n").split("\n")
    vocab = {piece: number for number, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):
        raise UserError(f"{path}: a piece stands on two lines")
    return vocab
