"""The tokenizers of CLIP and T5 on the light `tokenizers` library, id for id those of transformers.

CLIP: a folder holds vocab.json and merges.txt, or a tokenizer.json with both inside. What the end is
padded with is the file's word: SD3's first tokenizer pads with the end token, its second with "!" (id 0),
and a "!" in a prompt is then that token too.

T5: a folder holds tokenizer.json, or spiece.model alone.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import sentencepiece, unigram
from smart_grpo_jax.hub.unigram import Broken, Unigram

DEFAULTS: Mapping[str, str] = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}

WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

LONGEST = 4096
"""A model_max_length above this is transformers' way to say that none was given."""

T5_FIXED: Mapping[str, Any] = {
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "padding_side": "right",
    "truncation_side": "right",
    "split_special_tokens": False,
}
"""What a T5 folder's config may say of these, and what it means if it says nothing."""

SENTINELS = 1000
"""The most `<extra_id_…>` that a config may ask for; T5 has 100."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Prompts → ids [n, length], begun, ended, padded and cut to one length."""

    backend: Any
    length: int
    pad: int
    kind: str = "CLIP"

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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: got a {type(data).__name__}, wanted a JSON object")
    return data


def load_t5_tokenizer(folder: Path, length: int) -> Tokenizer:
    """The tokenizer of a T5 folder: `</s>` ends every row, also a cut one; id 0 fills it up to `length`."""
    if not 0 < length <= LONGEST:
        raise UserError(f"{folder}: t5_length: got {length}, wanted 1 to {LONGEST}")
    config = {**read_json(folder, "special_tokens_map.json"), **read_json(folder, "tokenizer_config.json")}
    for name, wanted in T5_FIXED.items():
        got = text_of(config.get(name))
        if got is not None and got != wanted:
            raise UserError(f"{folder}: {name}: got {got!r}, wanted {wanted!r}")
    backend = t5_backend(folder, config)
    backend.enable_truncation(length)
    return Tokenizer(backend, length, unigram.PAD, "T5")


def t5_backend(folder: Path, config: Mapping[str, Any]) -> Any:
    """The pieces of tokenizer.json or, where there is none, of spiece.model; and the tokens that are
    matched whole: those that the files name, the first three, and `<extra_id_…>`."""
    data, added = read_json(folder, "tokenizer.json"), read_json(folder, "added_tokens.json")
    source = folder / ("tokenizer.json" if data else "spiece.model")
    if not source.is_file():
        raise UserError(f"{folder}: wanted a tokenizer.json or a spiece.model")
    try:
        model = t5_json(data) if data else with_sentinels(sentencepiece.read(source), config)
        declared = declared_tokens(config, added, data)
        tokens = {token["content"]: token for _, token in declared}
        for name in [*unigram.FIRST, *model.whole, *special_names(config)]:
            tokens.setdefault(name, {"content": name, "normalized": False})
        backend = unigram.pipeline(model, list(tokens.values()))
        for number, token in declared:
            if (got := backend.token_to_id(token["content"])) != number:
                raise Broken(f"{token['content']!r} has id {got}, but a file says {number}")
    except Exception as error:  # whatever a foreign file leads to, in the library as well
        raise UserError(f"{source}: not a tokenizer of T5 ({error})") from error
    return backend


def t5_json(data: Mapping[str, Any]) -> Unigram:
    """The pieces and the normaliser's table of a tokenizer.json."""
    if data["model"]["type"] != "Unigram":
        raise Broken(f"model type {data['model']['type']!r}, wanted 'Unigram'")
    for name in ("padding", "truncation"):
        if (data.get(name) or {}).get("direction", "Right") != "Right":
            raise Broken(f"{name} on the left")
    normaliser = data.get("normalizer") or {}
    parts = normaliser["normalizers"] if normaliser.get("type") == "Sequence" else [normaliser]
    tables = [part["precompiled_charsmap"] for part in parts if part.get("type") == "Precompiled"]
    charsmap = base64.b64decode(tables[0]) if tables else b""
    return Unigram([(piece, score) for piece, score in data["model"]["vocab"]], charsmap)


def with_sentinels(model: Unigram, config: Mapping[str, Any]) -> Unigram:
    """spiece.model knows no `<extra_id_…>`: they follow its pieces, the last one first."""
    extra = [(name, 0.0) for name in reversed(sentinels(config))]
    return model._replace(pieces=[*model.pieces, *extra])


def sentinels(config: Mapping[str, Any]) -> list[str]:
    """The tokens that stood for gaps when T5 was trained."""
    count = config.get("extra_ids", 100)
    if not 0 <= count <= SENTINELS:
        raise Broken(f"extra_ids: got {count}, wanted 0 to {SENTINELS}")
    return [f"<extra_id_{i}>" for i in range(count)]


def special_names(config: Mapping[str, Any]) -> list[str]:
    """The special tokens beyond the first three: those that are listed, or else the sentinels."""
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    return [text_of(token) for token in listed] or sentinels(config)


def declared_tokens(
    config: Mapping[str, Any], added: Mapping[str, int], data: Mapping[str, Any]
) -> list[tuple[int, dict[str, Any]]]:
    """(id, token) in the order of the ids, from the newest of the three places that may hold them."""
    if "added_tokens_decoder" in config:
        found = [(int(number), as_token(token)) for number, token in config["added_tokens_decoder"].items()]
    else:
        special = {*unigram.FIRST, *special_names(config)}
        found = [(i, {"content": name, "normalized": name not in special}) for name, i in added.items()]
        found += [(token["id"], as_token(token)) for token in data.get("added_tokens") or ()]
    return sorted(found, key=lambda pair: pair[0])


def text_of(token: Any) -> Any:
    """The text of a special token, which files give with or without rules."""
    return token["content"] if isinstance(token, Mapping) and "content" in token else token
