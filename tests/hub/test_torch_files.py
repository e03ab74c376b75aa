"""Torch's weight files without torch: what they hold."""

import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import safetensors
from smart_grpo_jax.hub.streaming import long_axis
from smart_grpo_jax.hub.torch_files import TorchTensors, open_tensors
from tests.hub.torch_by_hand import NUMBERS, archive, integer, refusal, state, tensor, word

GOOD = state(a=tensor())


def test_a_file_by_hand_is_read(tmp_path):
    program = state(
        a=tensor(),
        b=tensor((2, 3), (3, 1)),
        t=tensor((3, 2), (1, 3)),
        part=tensor((2, 2), (3, 1), offset=1),
        scalar=tensor((), (), offset=5),
        empty=tensor((0, 4), (4, 1)),
        cuda=tensor(location="cuda:0"),
    )
    reader = TorchTensors(archive(tmp_path / "m.pt", program))
    square = NUMBERS.reshape(2, 3)
    wanted = {
        "a": NUMBERS,
        "b": square,
        "t": square.T,
        "part": square[:, 1:],
        "scalar": np.float32(5),
        "empty": np.zeros((0, 4), np.float32),
        "cuda": NUMBERS,
    }
    assert reader.keys() == set(wanted)
    for key, want in wanted.items():
        got = reader.tensor(key)
        assert got.dtype == reader.dtype(key) == np.float32
        assert got.shape == reader.shape(key) == want.shape and got.flags.c_contiguous
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(reader.rows("t", 1, 3), square.T[1:3])
    np.testing.assert_array_equal(reader.rows("part", 1, 2), square[1:, 1:])
    assert reader.file("a") == str(tmp_path / "m.pt")
    assert reader.nbytes() == 4 * (6 + 6 + 6 + 4 + 1 + 0 + 6)


def torch_state(torch):
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(base[0] + 0.5)
    tensors = {
        "float": base,
        "transposed": base.t(),
        "slice": base[1:3, 2:5],
        "every_other": base[:, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "one_row": torch.ones(1, 1, 4),
        "parameter": parameter,
        "tied": parameter,
        "bool": torch.tensor([True, False]),
    }
    kinds = ("bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8")
    news = ("uint16", "uint32", "float8_e4m3fn", "float8_e5m2")
    return tensors | {kind: base.to(getattr(torch, kind)) for kind in (*kinds, *news)}


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_torch_writes_comes_back(tmp_path, protocol, wrapped):
    torch = pytest.importorskip("torch")
    tensors = torch_state(torch)
    extras = {"epoch": 3, "loss": 0.5, "notes": ["a", None, (1, True), {"lr": 1e-4}], "arch": "ViT-H-14"}
    value = {"state_dict": tensors, **extras} if wrapped else tensors
    torch.save(value, tmp_path / "m.pt", pickle_protocol=protocol)
    reader = open_tensors(tmp_path / "m.pt")
    assert reader.keys() == set(tensors)
    for key, want in tensors.items():
        got = reader.tensor(key)
        kind = str(want.dtype).removeprefix("torch.")
        assert got.dtype.name == kind and reader.shape(key) == tuple(want.shape)
        np.testing.assert_array_equal(got.astype(np.float64), want.detach().double().numpy())
        if got.ndim and got.size:
            last = got.shape[long_axis(got.shape)]
            rows = reader.rows(key, last - 1, last)
            np.testing.assert_array_equal(rows, got.take([last - 1], long_axis(got.shape)))


@pytest.mark.torch
def test_state_dict_of_a_module_with_its_versions_is_read(tmp_path):
    """`state_dict()` hangs `_metadata` on its OrderedDict, which is an instruction of its own."""
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "m.pth")
    reader = open_tensors(tmp_path / "m.pth")
    assert reader.keys() == set(module.state_dict())
    for key, want in module.state_dict().items():
        np.testing.assert_array_equal(reader.tensor(key), want.numpy())


@pytest.mark.torch
def test_only_the_tensor_that_is_asked_for_is_in_memory(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {f"w{i}": torch.full((1000, 1000), float(i)) for i in range(8)}
    torch.save({**tensors, "t": tensors["w3"].t()}, tmp_path / "m.pt")
    tracemalloc.start()
    reader = open_tensors(tmp_path / "m.pt")
    reader.fingerprint()
    assert tracemalloc.get_traced_memory()[1] < 1e6
    for key in sorted(reader.keys() - {"t"}):
        assert reader.tensor(key)[-1, -1] == float(key[1:])
    assert tracemalloc.get_traced_memory()[1] < 1.2 * 4e6
    assert reader.rows("w5", 10, 20).shape == (10, 1000)
    tracemalloc.stop()


def test_entries_other_than_state_dict_are_read_by_name(tmp_path):
    inner = b"}" + word("w") + tensor() + b"s"
    path = archive(tmp_path / "m.pt", state(ema=inner, epoch=integer(3)))
    assert TorchTensors(path, inside="ema").keys() == {"w"}
    assert "no tensors at its top, only 'ema', 'epoch'" in refusal(path)
    assert "no dictionary 'emma'" in refusal(path, lambda p: TorchTensors(p, inside="emma"))


def test_a_fingerprint_follows_names_shapes_and_numbers(tmp_path):
    def mark(program, storages=None):
        path = archive(tmp_path / "m.pt", program, storages)
        return TorchTensors(path).fingerprint()

    other = {"0": (NUMBERS + 1).tobytes()}
    marks = [
        mark(state(a=tensor())),
        mark(state(b=tensor())),
        mark(state(a=tensor((2, 3), (3, 1)))),
        mark(state(a=tensor((3, 2), (1, 3)))),
        mark(state(a=tensor()), other),
    ]
    assert len(set(marks)) == len(marks)
    assert mark(state(a=tensor())) == marks[0]


def test_a_file_is_opened_by_what_it_is(tmp_path):
    archive(tmp_path / "torch.safetensors", state(a=tensor()))  # a name means nothing
    safetensors.write(tmp_path / "plain.pt", {"a": NUMBERS})
    (tmp_path / "folder").mkdir()
    safetensors.write(tmp_path / "folder" / "model.safetensors", {"a": NUMBERS})
    (tmp_path / "older").mkdir()
    archive(tmp_path / "older" / "pytorch_model.bin", state(a=tensor()))
    for place in ("torch.safetensors", "plain.pt", "folder", "older"):
        reader = open_tensors(tmp_path / place)
        assert reader.keys() == {"a"} and reader.dtype("a") == np.float32 and reader.nbytes() == 24
        np.testing.assert_array_equal(reader.tensor("a"), NUMBERS)
        assert len(reader.fingerprint()) == 64
    (tmp_path / "bare").mkdir()
    assert "wanted model.safetensors" in refusal(tmp_path / "bare", open_tensors)


def test_wide_archives_are_read(tmp_path):
    """Sizes and offsets in 64-bit fields, as in files beyond 4 GB."""
    path = tmp_path / "m.pt"
    data = archive(path, GOOD).read_bytes()
    at, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entries = b""
    while at < end:
        head, length = data[at : at + 46], struct.unpack("<H", data[at + 28 : at + 30])[0]
        packed, size, header = *struct.unpack("<2I", head[20:28]), *struct.unpack("<I", head[42:46])
        extra = struct.pack("<2H", 0x4246, 2) + b"ZZ" + struct.pack("<2H3Q", 1, 24, size, packed, header)
        head = (
            head[:20] + b"\xff" * 8 + head[28:30] + struct.pack("<H", len(extra)) + head[32:42] + b"\xff" * 4
        )
        entries += head + data[at + 46 : at + 46 + length] + extra
        at += 46 + length
    start = data.index(b"PK\1\2")
    wide = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 2, 2, len(entries), start)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, start + len(entries), 1)
    path.write_bytes(data[:start] + entries + wide + locator + b"PK\5\6" + bytes(4) + b"\xff" * 12 + b"\0\0")
    np.testing.assert_array_equal(TorchTensors(path).tensor("a"), NUMBERS)
    assert zipfile.ZipFile(path).read("archive/data/0") == NUMBERS.tobytes()  # it is a sound archive


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    path = archive(tmp_path / "m.pt", GOOD, {"0": bytes(400_000)} | {}, extra=())
    with pytest.raises(UserError, match="400000 bytes"):
        TorchTensors(path)
    path = archive(
        tmp_path / "m.pt", state(a=tensor((100_000,), (1,), stored=100_000)), {"0": bytes(400_000)}
    )
    reader = TorchTensors(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="ends inside 'a'"):
        reader.tensor("a")
    path.unlink()
    with pytest.raises(UserError, match="cannot read 'a'"):
        reader.tensor("a")
