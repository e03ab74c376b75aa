"""The tokenizer of the embedded world: CLIP's byte-level BPE, trained until every word is one token."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Sequence

LENGTH = 14
"""Tokens per prompt: the longest prompt has 11 words, then start, end, and room for a full stop."""

START, END = "<|startoftext|>", "<|endoftext|>"


def byte_letters() -> list[str]:
    """The 256 letters of byte-level BPE, in CLIP's order: printable bytes stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def train(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges, most frequent pair first (ties by spelling), until every word is a single symbol."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = collections.Counter(p for s in split.values() for p in itertools.pairwise(s))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(symbols, best) for word, symbols in split.items()}


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def files(words: Sequence[str], pad: str) -> dict[str, str]:
    """The files of a tokenizer folder that transformers' CLIPTokenizer loads, by name."""
    letters = byte_letters()
    merges = train(words)
    symbols = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "clean_up_tokenization_spaces": True,
        **special,
    }
    return {
        "vocab.json": json.dumps({s: i for i, s in enumerate(symbols)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
