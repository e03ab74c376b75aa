"""T5's tokenizer against transformers, from tokenizer.json and from spiece.model; and files that are none."""

import base64
import json
import random
import struct

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import unigram
from smart_grpo_jax.hub.tokenizers import load_t5_tokenizer
from smart_grpo_jax.hub.unigram import Broken

ODD = [
    "", " ", "\n\t\r ", "a red circle", "  A  RED\n\tcircle! ", "don't we'll I'm",
    "cafe\u0301 caf\u00e9 CAFE\u0301", "\u0301", "数 字 ½ ２ ٣ 1234", "Москва привет שלום नमस्ते ไทย",
    "a</s>red </s> blue <pad><pad> x<unk>y <extra_id_0> <extra_id_99>b <extra_id_100>",
    "🙂 \u200d 🏳️‍🌈 👩‍👩‍👧", "\x00\x07 nul \ufeff bom \u0085 next \u2028 line \u3000 wide",
    "ＦＵＬＬ　ｗｉｄｔｈ ﬁ İ ß ǅ", "▁red ▁ ▁▁circle", "red " * 60, "a" * 500, "red circle" * 60,
    "</s", "<loc> Zebra",
]  # fmt: skip

SENTENCES = [
    "a red circle above a blue square", "two green triangles and one yellow star", "don't move the café",
    "an orange circle left of the purple square", "three circles, four squares, 12 stars!", "RED AND BLUE",
]  # fmt: skip

RULES = {
    "e\u0301": "\u00e9", "E\u0301": "É", "ﬁ": "fi", "\t": " ", "\n": " ", "\u3000": " ", "\u0301": "",
    "\ufeff": "",
    **{chr(0xFF21 + i): chr(65 + i) for i in range(26)}, "２": "2", "½": "1\u20442",
}  # fmt: skip


def charsmap(rules):
    """A normaliser's table: a double-array trie that gives each node with children 256 places of its own."""
    units, texts = [0] * 256, b""
    places = {b"": (0, 0)}  # sequence → (its place, its base)
    for source, target in rules.items():
        key = source.encode()
        for end in range(1, len(key) + 1):
            if key[:end] not in places:
                place, base = places[key[: end - 1]][1] ^ key[end - 1], len(units)
                units += [0] * 256
                assert place ^ base < 1 << 21
                units[place] = (place ^ base) << 10 | key[end - 1]
                places[key[:end]] = (place, base)
        place, base = places[key]
        units[place] |= 1 << 8
        units[base] = 1 << 31 | len(texts)
        texts += target.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def varint(value):
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def number_field(number, value):
    return varint(number << 3) + varint(value)


def spiece(vocab, table, unknown=2, model_type=1):
    """A spiece.model as SentencePiece writes it: pieces, trainer, normaliser, and one field that follows."""
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = b"".join(
        message(1, message(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
                + (number_field(3, kinds[piece]) if piece in kinds else b""))
        for piece, score in vocab
    )  # fmt: skip
    trainer = message(1, b"corpus.txt") + number_field(3, model_type) + number_field(40, unknown)
    normaliser = message(1, b"nmt_nfkc") + message(2, table) + number_field(3, 1)
    return pieces + message(2, trainer) + message(3, normaliser) + message(5, b"")


@pytest.fixture(scope="module")
def vocab():
    """T5's first three pieces and some learned ones; scores as float32, as spiece.model holds them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"]
    learned = [(piece, float(np.float32(score))) for piece, score in learned]
    assert [piece for piece, _ in learned[:3]] == ["<pad>", "</s>", "<unk>"] and len(learned) > 40
    return learned


def token(content, **rules):
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"content": content, **plain, **rules}


def tokenizer_json(vocab, table, extra=100, **change):
    """A tokenizer.json as transformers 4 converted them."""
    vocab = [*vocab, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(extra)))]
    special = ["<pad>", "</s>", "<unk>", *(piece for piece, _ in vocab[len(vocab) - extra :])]
    ids = {piece: i for i, (piece, _) in enumerate(vocab)}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    data = {
        "version": "1.0",
        "added_tokens": [token(name, id=ids[name]) for name in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()},
                {"type": "Strip", "strip_left": False, "strip_right": True},
                spaces,
            ],
        },
        "pre_tokenizer": {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": None, "padding": None, "truncation": None,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }  # fmt: skip
    return {**data, **change}


def config_4(count):
    """tokenizer_config.json as transformers 4 wrote it; sentinels take the white space around them."""
    decoder = {str(i): token(name) for i, name in enumerate(("<pad>", "</s>", "<unk>"))}
    for i in range(100):
        decoder[str(count + i)] = token(f"<extra_id_{99 - i}>", lstrip=True, rstrip=True)
    return {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
        "clean_up_tokenization_spaces": True, "eos_token": "</s>", "extra_ids": 100, "legacy": True,
        "model_max_length": 512, "pad_token": "<pad>", "sp_model_kwargs": {}, "unk_token": "<unk>",
    }  # fmt: skip


def write(path, **files):
    """The files of a folder: text, bytes, or an object that becomes JSON."""
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        name = name.replace("__", ".")
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def files(vocab):
    """The kinds of folders that are met, by name."""
    table, count = charsmap(RULES), len(vocab)
    whole = tokenizer_json(vocab, table)
    special = {"eos_token": token("</s>"), "pad_token": "<pad>", "unk_token": token("<unk>")}
    loc = {"added_tokens_decoder": {
        **config_4(count)["added_tokens_decoder"],
        str(count + 100): token("<loc>"), str(count + 101): token("Zebra", normalized=True, special=False),
    }}  # fmt: skip
    return {
        "json": {"tokenizer__json": whole},
        "version_4": {
            "tokenizer__json": whole, "tokenizer_config__json": config_4(count),
            "special_tokens_map__json": special,
        },
        "no_table": {"tokenizer__json": {**whole, "normalizer": None}},
        "one_table": {"tokenizer__json": {**whole, "normalizer": whole["normalizer"]["normalizers"][0]}},
        "no_sentinels": {
            "tokenizer__json": tokenizer_json(vocab, table, 0),
            "tokenizer_config__json": {"extra_ids": 0, "additional_special_tokens": []},
        },
        "sentinels_of_the_config": {"tokenizer__json": tokenizer_json(vocab, table, 0)},
        "more_tokens": {"tokenizer__json": whole, "tokenizer_config__json": loc},
        "listed_token": {
            "tokenizer__json": whole, "tokenizer_config__json": {"additional_special_tokens": ["<loc>"]},
        },
        "baked_lengths": {
            "tokenizer__json": {
                **whole,
                "truncation": {
                    "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0,
                },
            },
        },
    }  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize(
    "kind",
    [
        "json", "version_4", "no_table", "one_table", "no_sentinels", "sentinels_of_the_config",
        "more_tokens", "listed_token", "baked_lengths",
    ],
)  # fmt: skip
def test_ids_equal_transformers(kind, files, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path / "t", **files[kind])
    theirs = transformers.T5TokenizerFast.from_pretrained(path)
    want = theirs(ODD, padding="max_length", max_length=24, truncation=True).input_ids
    np.testing.assert_array_equal(load_t5_tokenizer(path, 24)(ODD), want)
    theirs.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(load_t5_tokenizer(tmp_path / "saved", 24)(ODD), want)


def test_spiece_model_gives_the_ids_of_tokenizer_json(vocab, files, tmp_path):
    want = load_t5_tokenizer(write(tmp_path / "j", **files["json"]), 40)
    path = write(tmp_path / "s", spiece__model=spiece(vocab, charsmap(RULES)))
    np.testing.assert_array_equal(load_t5_tokenizer(path, 40)(ODD), want(ODD))
    write(path, tokenizer_config__json=config_4(len(vocab)))
    np.testing.assert_array_equal(load_t5_tokenizer(path, 40)(ODD), want(ODD))
    ids = load_t5_tokenizer(path, 5)(["<extra_id_99><extra_id_0>"])[0]
    assert ids.tolist() == [len(vocab), len(vocab) + 99, 1, 0, 0]


def test_the_normaliser_of_spiece_model_counts(vocab, tmp_path):
    # Without its table the accent and the wide letters are unknown.
    with_table = load_t5_tokenizer(write(tmp_path / "a", spiece__model=spiece(vocab, charsmap(RULES))), 12)
    without = load_t5_tokenizer(write(tmp_path / "b", spiece__model=spiece(vocab, b"")), 12)
    plain, odd = ["caf\u00e9", "RED", "red circle"], ["cafe\u0301", "ＲＥＤ", "red\n\tcircle\ufeff"]
    np.testing.assert_array_equal(with_table(odd), with_table(plain))
    np.testing.assert_array_equal(with_table(plain), without(plain))
    assert (without(odd)[:2] == unigram.UNKNOWN).any(1).all()


def test_every_row_is_ended_and_filled_up_to_the_length(files, vocab, tmp_path):
    path = write(tmp_path, **files["version_4"])
    ids = load_t5_tokenizer(path, 7)(["", "red " * 40, "a red circle"])
    assert ids.shape == (3, 7) and ids.dtype == np.int32
    assert ids[0].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert ids[1, -1] == 1 and (ids[1, :-1] > 2).all()
    assert load_t5_tokenizer(path, 1)(["red", ""]).tolist() == [[1], [1]]
    assert load_t5_tokenizer(path, 7).pad == 0


def test_truncated_prompts_are_counted(files, tmp_path):
    path = write(tmp_path, **files["json"])
    each = int((load_t5_tokenizer(path, 9)(["red"]) > 1).sum())
    tokenizer = load_t5_tokenizer(path, 4 * each + 1)
    assert tokenizer.truncated(["red " * 4, "red " * 5, "", "a" * 99999]) == 2
    assert load_t5_tokenizer(path, 4 * each).truncated(["red " * 4]) == 1


def test_a_model_that_was_cut_short_is_refused_or_lacks_nothing(vocab, tmp_path):
    vocab, table = vocab[:12], charsmap({"a": "b"})
    data = spiece(vocab, table)
    want = load_t5_tokenizer(write(tmp_path, spiece__model=data), 9)(ODD)
    inside = range(data.index(table) + 1, data.index(table) + len(table))
    for end in (end for end in range(len(data)) if end not in inside or end % 50 == 0):
        write(tmp_path, spiece__model=data[:end])
        if end == len(data) - 2:  # nothing is missing but a field that is not read
            np.testing.assert_array_equal(load_t5_tokenizer(tmp_path, 9)(ODD), want)
        else:
            with pytest.raises(UserError, match=r"spiece\.model: not a tokenizer of T5") as error:
                load_t5_tokenizer(tmp_path, 9)
            assert "\n" not in error.value.line


def test_damage_is_a_user_error_or_harmless(vocab, tmp_path):
    rng, data = random.Random(0), spiece(vocab, charsmap(RULES))
    used = [i for i, byte in enumerate(data) if byte]  # most of the table's places are empty
    table = [i for i in used if i > data.index(b"nmt_nfkc") + 8]
    refused = 0
    for trial in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.choice(table if trial % 2 else used)] = rng.randrange(256)
        write(tmp_path, spiece__model=bytes(damaged))
        try:
            load_t5_tokenizer(tmp_path, 9)([*ODD, "".join(RULES)])
        except UserError:
            refused += 1
    assert 50 < refused < 300


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00", b"\xff" * 64, b"<!DOCTYPE html><html>Not Found</html>",
        b"\x89PNG\r\n\x1a\n" + bytes(99),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 791656\n", b"\x0a" * 9999,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_a_foreign_file_is_one_line(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        load_t5_tokenizer(tmp_path, 9)
    assert "\n" not in error.value.line


def test_models_of_other_families_are_refused(vocab, tmp_path):
    table = charsmap(RULES)
    others = {
        "first pieces": spiece([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *vocab[3:]], table),
        "unknown piece 0": spiece(vocab, table, unknown=0),
        "model type 2": spiece(vocab, table, model_type=2),
        "piece 5": spiece([*vocab[:5], ("", -1.0), *vocab[5:]], table),
        "nan": spiece([*vocab, ("zz", float("nan"))], table),
    }
    for match, data in others.items():
        with pytest.raises(UserError, match=match):
            load_t5_tokenizer(write(tmp_path, spiece__model=data), 9)


def test_a_table_that_points_outside_of_itself_is_refused():
    table = charsmap(RULES)
    size = int.from_bytes(table[:4], "little")
    unigram.check_charsmap(table)
    place = 4 + 4 * ord("\t")  # the root's base is 0, so that its units are at their bytes
    leaf = int.from_bytes(table[place : place + 4], "little")

    def changed(at, value):
        return table[:at] + value.to_bytes(4, "little") + table[at + 4 :]

    base = 4 * (ord("\t") ^ leaf >> 10)
    damaged = {
        "has": [
            changed(0, size + 4 * len(table)),
            changed(0, 0xFFFFFFFC),
            table[: size // 2],
            table[:3],
            b"x",
        ],
        "outside of itself": [changed(place, leaf & 0x1FF | 0x1FFFFF << 10)],
        "outside of its texts": [changed(4 + base, 1 << 31 | 1 << 20)],
    }
    for match, tables in damaged.items():
        for bad in tables:
            with pytest.raises(Broken, match=match):
                unigram.check_charsmap(bad)
    with pytest.raises(Broken, match="deeper"):
        unigram.check_charsmap(charsmap({"a" * 70: "b"}))
    with pytest.raises(UnicodeDecodeError):
        unigram.check_charsmap(table + b"\xff")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pad_token": "<unk>"}, "pad_token"),
        ({"eos_token": token("<end>")}, "eos_token"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"extra_ids": 10**9}, "extra_ids"),
        ({"extra_ids": "many"}, "not a tokenizer of T5"),
        ({"added_tokens_decoder": {"7": token("<loc>")}}, "<loc>.* has id"),
        ({"added_tokens_decoder": [1]}, "not a tokenizer of T5"),
        ({"additional_special_tokens": [3]}, "not a tokenizer of T5"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, match, files, tmp_path):
    files = {**files["json"], "tokenizer_config__json": change}
    with pytest.raises(UserError, match=match):
        load_t5_tokenizer(write(tmp_path, **files), 9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "BPE"),
        ({"model": {}}, "not a tokenizer of T5"),
        ({"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["</s>"]]}}, "not a tokenizer of T5"),
        ({"model": {"type": "Unigram", "vocab": []}}, "first pieces"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "table"),
        ({"padding": {"direction": "Left"}}, "left"),
        ({"added_tokens": [{"content": "<pad>"}]}, "not a tokenizer of T5"),
    ],
)
def test_a_json_that_does_not_fit_is_refused(change, match, files, tmp_path):
    data = {**files["json"]["tokenizer__json"], **change}
    with pytest.raises(UserError, match=match):
        load_t5_tokenizer(write(tmp_path, tokenizer__json=data), 9)


def test_a_missing_or_endlessly_nested_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"wanted a tokenizer\.json or a spiece\.model"):
        load_t5_tokenizer(tmp_path, 9)
    with pytest.raises(UserError, match="not a JSON file"):
        load_t5_tokenizer(write(tmp_path, tokenizer__json=b"[" * 200_000), 9)
    with pytest.raises(UserError, match="t5_length"):
        load_t5_tokenizer(tmp_path, 0)
