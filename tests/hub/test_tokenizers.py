"""The tokenizer against transformers, on ordinary and on odd strings."""

import json

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.tokenizers import load_tokenizer
from smart_grpo_jax.worlds.shapes import vocabulary

WORDS = ["a", "red", "circle", "above", "blue", "don't", "café", "two", "and", "!!"]
ODD = [
    "",
    " ",
    "a red circle",
    "A  RED\n\tcircle!",
    "don't we'll I'm",
    "cafe\u0301 café CAFÉ",
    "数 字 ½ ２ ٣ 1234",
    "a<|endoftext|>red <|startoftext|> blue",
    "!", "a!!b !", "hello!world",
    "🙂 \u200d 🏳️‍🌈",
    "\x00\x07 nul \ufeff bom",
    "ＦＵＬＬ　ｗｉｄｔｈ İ ß ǅ",
    "red " * 40,
    "a" * 300,
    "'s 't 're",
    "<|endoftext|",
]  # fmt: skip


def folder(path, pad="<|endoftext|>", **change):
    path.mkdir(exist_ok=True)
    for name, text in vocabulary.files(WORDS, pad).items():
        if name == "tokenizer_config.json":
            text = json.dumps({**json.loads(text), **change})
        (path / name).write_text(text, encoding="utf-8")
    return path


PADS = {
    "end": {},
    "exclamation": {"pad": "!"},
    "rules": {
        "pad": "!",
        "bos_token": {
            "__type": "AddedToken", "content": "<|startoftext|>", "normalized": True,
            "lstrip": False, "rstrip": False, "single_word": False,
        },
    },
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", PADS)
def test_ids_equal_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path / "t", **PADS[name])
    theirs = transformers.CLIPTokenizer.from_pretrained(path)
    want = theirs(ODD, padding="max_length", max_length=14, truncation=True).input_ids
    np.testing.assert_array_equal(load_tokenizer(path)(ODD), want)
    theirs.save_pretrained(tmp_path / "saved")  # transformers 5 writes tokenizer.json alone
    assert not (tmp_path / "saved" / "vocab.json").exists()
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "saved")(ODD), want)


def test_prompts_begin_and_end_and_are_padded_to_one_length(tmp_path):
    tokenizer = load_tokenizer(folder(tmp_path, "!"))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    ids = tokenizer(["a red circle", "red " * 40])
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert ids.shape == (2, 14) and ids.dtype == np.int32
    words = [vocab[w] for w in ("a</w>", "red</w>", "circle</w>")]
    assert ids[0].tolist() == [start, *words, end, *[vocab["!"]] * 9]
    assert ids[1].tolist() == [start, *[vocab["red</w>"]] * 12, end]
    assert tokenizer.pad == 0


def test_truncated_prompts_are_counted(tmp_path):
    tokenizer = load_tokenizer(folder(tmp_path))
    assert tokenizer.truncated(["red " * 12, "red " * 13, "", "a " * 99]) == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"model_max_length": 1e30}, "model_max_length"),
        ({"model_max_length": 2}, "model_max_length"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, match):
    with pytest.raises(UserError, match=match):
        load_tokenizer(folder(tmp_path, **change))


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"wanted vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)
    folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match=r"vocab\.json: not a JSON file"):
        load_tokenizer(tmp_path)
