"""CLIP's tokenizer on the light `tokenizers` library, id for id that of transformers' `CLIPTokenizer`.

A folder holds vocab.json and merges.txt, or a tokenizer.json with both inside. What the end is padded
with is the file's word: SD3's first tokenizer pads with the end token, its second with "!" (id 0), and
a "!" in a prompt is then that token too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from smart_grpo_jax.core.errors import UserError

DEFAULTS: Mapping[str, str] = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

LONGEST = 4096
"""A model_max_length above this is transformers' way to say that none was given."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Prompts → ids [n, length], begun, ended, padded and cut to one length."""

    backend: Any
    length: int
    pad: int

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n s"]:
        """The ids of each text, exactly `length` of them."""
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        for row, encoding in zip(ids, self.backend.encode_batch(list(texts)), strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return ids

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts lose words to the length."""
        return sum(bool(encoding.overflowing) for encoding in self.backend.encode_batch(list(texts)))


def load_tokenizer(folder: Path, length: int | None = None) -> Tokenizer:
    """The tokenizer of a folder; `length` replaces its own model_max_length."""
    from tokenizers import AddedToken

    vocab, merges = vocabulary(folder)
    config = {**read_json(folder, "special_tokens_map.json"), **read_json(folder, "tokenizer_config.json")}
    special = {role: as_token(config.get(role) or default) for role, default in DEFAULTS.items()}
    for role, token in special.items():
        if token["content"] not in vocab:
            raise UserError(f"{folder}: {role} {token['content']!r} is not in the vocabulary")
    length = length or int(config.get("model_max_length", LONGEST + 1))
    if not 2 < length <= LONGEST:
        raise UserError(f"{folder}: model_max_length: got {length}, wanted 3 to {LONGEST}")
    names = {role: token["content"] for role, token in special.items()}
    backend = clip_bpe(vocab, merges, names)
    backend.add_special_tokens([AddedToken(**token) for token in special.values()])
    backend.enable_truncation(length)
    return Tokenizer(backend, length, vocab[names["pad_token"]])


def as_token(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """A special token as the file gives it: a string, or a string with matching rules."""
    if isinstance(entry, str):
        return {"content": entry, "normalized": False}
    rules = ("content", "lstrip", "rstrip", "single_word", "normalized")
    return {rule: entry[rule] for rule in rules if rule in entry}


def clip_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], names: Mapping[str, str]) -> Any:
    """NFC, one space for any white space, lower case, CLIP's words, byte-level BPE with `</w>`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    model = models.BPE(
        vocab,
        merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=names["unk_token"],
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ends = [(names[role], vocab[names[role]]) for role in ("eos_token", "bos_token")]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return backend


def vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token → id, and the merges in order."""
    if (folder / "vocab.json").is_file():
        vocab = read_json(folder, "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"{folder}: vocab.json without a readable merges.txt ({error})") from error
        merges = [line.split() for line in lines if line and not line.startswith("#version")]
    else:
        model = read_json(folder, "tokenizer.json").get("model", {})
        vocab, merges = model.get("vocab", {}), model.get("merges", [])
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        vocab = {
            **{t["content"]: t["id"] for t in read_json(folder, "tokenizer.json").get("added_tokens", ())},
            **vocab,
        }
    if not vocab or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{folder}: wanted vocab.json and merges.txt, or a tokenizer.json with both")
    return vocab, [(first, second) for first, second in merges]


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; empty where there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: got a {type(data).__name__}, wanted a JSON object")
    return data
