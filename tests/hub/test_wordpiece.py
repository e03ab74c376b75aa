"""BERT's tokenizer against transformers, on a tiny vocabulary."""

import json

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.wordpiece import load_wordpiece

PIECES = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "red", "##s", "cat", "dog", "cafe", "naive", "##e", "un", "##aff", "##able", "two"),
    *("红", "色", ".", ",", "!", "'", "s", "-", "[", "]", "dec"),
]

PROMPTS = [
    "a red cat",
    "A CAFÉ, naïve!",
    "cafe\u0301",
    "",
    " \t\n ",
    "a " * 50,
    "unaffable dogs " * 20,
    "zzz quixotic",
    "🙂 red🙂cat",
    "红色猫cat",
    "한국 a",
    "cats' dog's two-dogs.",
    "a\x00\x07 red\u200b cat\u00a0dog\ttwo\r\n",
    "a\ufffdred \u2028 cat",
    "x" * 150,
    "İ ẞ ﬁ Å",
    "[DEC] a [ENC][MASK] [dec]",
    "[ENC]a red[DEC]cat [CLS] [UNK] [PAD]",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return tmp_path


def test_ids_and_masks_are_those_of_blips_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer.from_pretrained(str(folder))
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    want = theirs(PROMPTS, padding="max_length", truncation=True, max_length=35)
    ours = load_wordpiece(folder)
    ids, mask = ours(PROMPTS)
    assert ids.dtype == mask.dtype == np.int32 and ids.shape == mask.shape == (len(PROMPTS), 35)
    for row, prompt in enumerate(PROMPTS):
        assert ids[row].tolist() == want["input_ids"][row], prompt
        assert mask[row].tolist() == want["attention_mask"][row], prompt
    assert ours.size == len(theirs)


def test_the_two_added_tokens_follow_the_vocabulary(folder):
    ours = load_wordpiece(folder)
    ids, _ = ours(["[DEC] [ENC]"])
    assert ids[0, :4].tolist() == [3, len(PIECES), len(PIECES) + 1, 4]
    assert ours.size == len(PIECES) + 2


def test_what_each_rule_does(folder):
    """By hand, so that it holds without transformers as well."""
    ours = load_wordpiece(folder, length=8)
    at = {piece: number for number, piece in enumerate(PIECES)}

    def pieces(text):
        ids, mask = ours([text])
        assert (ids[0][mask[0] == 0] == at["[PAD]"]).all()
        return [PIECES[i] for i in ids[0, 1 : mask[0].sum() - 1]]

    assert pieces("Café NAÏVE") == ["cafe", "naive"]
    assert pieces("红色 unaffable") == ["红", "色", "un", "##aff", "##able"]
    assert pieces("reds🙂 cat\x07s") == ["[UNK]", "cat", "##s"]
    assert pieces("") == []
    ids, mask = ours(["a " * 50])
    assert ids[0].tolist() == [at["[CLS]"], *[at["a"]] * 6, at["[SEP]"]] and mask.all()


def test_cut_prompts_are_counted(folder):
    ours = load_wordpiece(folder)
    assert ours.truncated(["a " * 33, "a " * 34, "", "red cat"]) == 1


def test_a_tokenizer_json_means_the_same(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("fast")
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    data = {"model": {"type": "WordPiece", "vocab": vocab}}
    (other / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    for ours, theirs in zip(load_wordpiece(other)(PROMPTS), load_wordpiece(folder)(PROMPTS), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_windows_vocabulary_means_the_same(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("crlf")
    (other / "vocab.txt").write_bytes(b"\r\n".join(piece.encode() for piece in PIECES))
    np.testing.assert_array_equal(load_wordpiece(other)(PROMPTS)[0], load_wordpiece(folder)(PROMPTS)[0])


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "wanted vocab.txt"),
        ({"vocab.txt": ""}, "lacks"),
        ({"vocab.txt": "\n".join(PIECES[1:])}, r"lacks '\[PAD\]'"),
        ({"vocab.txt": "\n".join([*PIECES, "red"])}, "two lines"),
        ({"vocab.txt": b"\xff\xfe\x00"}, "cannot be read"),
        ({"tokenizer.json": "{"}, "not a JSON file"),
        ({"tokenizer.json": "[]"}, "wanted a JSON object"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}}}'}, "WordPiece vocabulary"),
        ({"tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {"a": "0"}}}'}, "WordPiece vocabulary"),
        ({"tokenizer.json": '{"model": []}'}, "WordPiece vocabulary"),
        ({"vocab.txt": "\n".join(PIECES), "tokenizer_config.json": '{"do_lower_case": false}'}, "uncased"),
    ],
)
def test_a_bad_folder_costs_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_wordpiece(tmp_path)
    assert "\n" not in caught.value.line


def test_ids_with_gaps_are_refused(tmp_path):
    vocab = {piece: 7 * number for number, piece in enumerate(PIECES)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": vocab}}))
    with pytest.raises(UserError, match="are not 0 to"):
        load_wordpiece(tmp_path)


def test_an_impossible_length_is_refused(folder):
    for length in (0, 2, 5000):
        with pytest.raises(UserError, match=f"length: got {length}"):
            load_wordpiece(folder, length)
