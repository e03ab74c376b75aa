"""Weight files: whole, sharded, damaged, hostile."""

import json
import struct
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.hub import tables, weights
from smart_grpo_jax.hub.safetensors import Tensors, open_folder, write
from smart_grpo_jax.models.presets import preset

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2.0], np.float16),
    "c": np.array([[0.25], [3.0]], ml_dtypes.bfloat16),
    "d": np.array(7, np.int64),
}


def test_tensors_come_back_in_their_dtypes(tmp_path):
    write(tmp_path / "m.safetensors", TENSORS)
    reader = open_folder(tmp_path, "m")
    assert reader.keys() == set(TENSORS)
    for key, want in TENSORS.items():
        got = reader.tensor(key)
        assert got.dtype == want.dtype and reader.shape(key) == want.shape
        np.testing.assert_array_equal(got, want)
    assert reader.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob("*.tmp"))


def test_transposed_tensors_are_written_by_value(tmp_path):
    write(tmp_path / "m.safetensors", {"t": TENSORS["a"].T})
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "m.safetensors")["t"], TENSORS["a"].T
    )


def sharded(folder, weight_map=None):
    write(folder / "m-00001-of-00002.safetensors", {"a": TENSORS["a"]})
    write(folder / "m-00002-of-00002.safetensors", {"b": TENSORS["b"]})
    weight_map = weight_map or {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_leads_to_its_shards_and_variants_are_never_read(tmp_path):
    sharded(tmp_path)
    write(tmp_path / "m.fp16.safetensors", {"z": TENSORS["b"]})
    reader = open_folder(tmp_path, "m")
    assert reader.keys() == {"a", "b"}
    assert reader.file("b").endswith("m-00002-of-00002.safetensors")
    np.testing.assert_array_equal(reader.tensor("b"), TENSORS["b"])


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../m-00001-of-00002.safetensors"}, "not a file name"),
        ({"a": 3}, "not a file name"),
        ({"a": "m-00002-of-00002.safetensors"}, "lacks it"),
        ({"a": "m-00003-of-00002.safetensors"}, "no such file"),
        ({"a": ["x"]}, "not a file name"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, match):
    sharded(tmp_path, weight_map)
    with pytest.raises(UserError, match=match):
        open_folder(tmp_path, "m")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_folder(tmp_path, "m")


def header(data):
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "empty": b"",
    "garbage": b"\xff" * 64,
    "huge_header": struct.pack("<Q", 2**62) + b"{}",
    "not_json": struct.pack("<Q", 4) + b"nope",
    "outside": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + b"\0" * 8,
    "wrong_size": header({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}) + b"\0" * 16,
    "overlap": header(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    )
    + b"\0" * 12,
    "odd_dtype": header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}) + b"\0" * 4,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_user_error(tmp_path, name):
    (tmp_path / "m.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=r"m\.safetensors") as caught:
        open_folder(tmp_path, "m")
    assert len(caught.value.line) <= 200


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, TENSORS)
    whole = path.read_bytes()
    for cut in (1, 3, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            Tensors(path)


def test_a_missing_file_and_an_unwritable_folder_say_so(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_folder(tmp_path, "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        write(tmp_path / "file" / "m.safetensors", TENSORS)
    with pytest.raises(UserError, match="float64"):
        write(tmp_path / "m.safetensors", {"a": np.zeros(2)})


def test_rows_are_read_alone(tmp_path):
    write(tmp_path / "m.safetensors", TENSORS)
    reader = Tensors(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(reader.rows("a", 1, 2), TENSORS["a"][1:2])
    np.testing.assert_array_equal(reader.rows("c", 0, 2), TENSORS["c"])
    assert reader.nbytes() == sum(t.nbytes for t in TENSORS.values())


def test_a_file_that_is_cut_after_it_was_opened_says_so(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, TENSORS)
    reader = Tensors(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="ends inside"):
        [reader.tensor(key) for key in reader.keys()]


def test_a_key_that_appears_twice_is_refused(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        Tensors(tmp_path / "m.safetensors")


def test_a_fingerprint_follows_every_tensor_and_not_the_files_they_lie_in(tmp_path):
    write(tmp_path / "m.safetensors", TENSORS)
    base = Tensors(tmp_path / "m.safetensors").fingerprint()
    for key, tensor in TENSORS.items():
        write(tmp_path / "n.safetensors", {**TENSORS, key: tensor + tensor.dtype.type(1)})
        assert Tensors(tmp_path / "n.safetensors").fingerprint() != base
    write(tmp_path / "n.safetensors", {**TENSORS, "a": TENSORS["a"].reshape(3, 2)})
    assert Tensors(tmp_path / "n.safetensors").fingerprint() != base
    write(tmp_path / "n.safetensors", dict(reversed(TENSORS.items())), {"remark": "other"})
    assert Tensors(tmp_path / "n.safetensors").fingerprint() == base


def mutated(whole, rng):
    """The file with one thing wrong: a byte, a cut, an insertion, its length, or a number of its header."""
    length = struct.unpack("<Q", whole[:8])[0]
    data = bytearray(whole)
    kind = rng.integers(6)
    at = int(rng.integers(8, 8 + length))
    if kind == 0:
        data[at] = rng.integers(256)
    elif kind == 1:
        data[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 2:
        del data[int(rng.integers(len(data))) :]
    elif kind == 3:
        data[at:at] = rng.bytes(int(rng.integers(1, 40)))
    elif kind == 4:
        data[int(rng.integers(8))] = rng.integers(256)
    else:
        digits = [i for i in range(8, 8 + length) if chr(data[i]).isdigit()]
        data[digits[int(rng.integers(len(digits)))]] = ord("0") + int(rng.integers(10))
    return bytes(data)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_mutated_header_is_refused_or_means_the_same(tmp_path, count):
    config = preset("tiny")["text_encoder"]
    rng = np.random.default_rng(count)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape, np.float32), weights.CLIP_TEXT.abstract(config)
    )
    path = tmp_path / "model.safetensors"
    write(path, tables.to_tensors(weights.CLIP_TEXT, config, params))
    whole, refused, longest = path.read_bytes(), 0, 0.0
    for _ in range(count):
        path.write_bytes(mutated(whole, rng))
        started = time.monotonic()
        try:
            again = tables.to_params(weights.CLIP_TEXT, config, open_folder(tmp_path, "model"))
        except UserError as error:
            refused += 1
            assert "model.safetensors" in str(error) and len(error.line) <= 200
        else:
            jax.tree.map(np.testing.assert_array_equal, params, again)
        longest = max(longest, time.monotonic() - started)
    assert refused > 0.7 * count  # the rest changed nothing, or only the remarks
    assert longest < 1.0
