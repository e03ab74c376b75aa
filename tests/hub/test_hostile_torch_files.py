"""Torch's weight files that mean harm, or are broken: each costs one line."""

import io
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import torch_archive, torch_files, torch_names, torch_pickle
from smart_grpo_jax.hub.torch_files import TorchTensors, open_tensors
from tests.hub.torch_by_hand import NUMBERS, archive, counts, integer, name, refusal, state, tensor, word


class Run:
    """Pickles as a call, as malware does."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def deep(opening, closing, count=100_000):
    return b"\x80\x02" + opening * count + b"N" + closing * count + b"."


PICKLES = {
    "os.system": (pickle.dumps({"a": Run(os.system, "touch owned")}, 2), "'posix.system'"),
    "eval": (pickle.dumps({"a": Run(eval, "open('owned', 'w')")}, 4), "'builtins.eval'"),
    "getattr": (pickle.dumps({"a": Run(getattr, NUMBERS, "dump")}, 2), "which weights do not need"),
    "torch.load": (state(a=name("torch.load") + b"(" + word("x") + b"tR"), "'torch.load'"),
    "dotted": (
        state(a=word("torch") + word("_utils._rebuild_tensor_v2.__globals__") + b"\x93"),
        "weights do not",
    ),
    "split elsewhere": (state(a=b"ctorch._utils._rebuild_tensor_v2\n__call__\n"), "weights do not need"),
    "numpy scalar": (pickle.dumps({"a": np.float64(1)}, 2), "numpy"),
    "class instance": (pickle.dumps({"a": ValueError("x")}, 2), "exceptions.ValueError"),
    "call of a class": (state(a=name("torch.FloatStorage") + b")R"), "calls torch.FloatStorage"),
    "call of a number": (state(a=b"K\1)R"), "calls 1"),
    "call without a tuple": (state(a=name("collections.OrderedDict") + b"}R"), "calls collections"),
    "OrderedDict of something": (state(a=name("collections.OrderedDict") + b"]\x85R"), "from arguments"),
    "setstate on a tensor": (state(a=tensor() + b"}b"), "no dict"),
    "setstate on a class": (state(a=name("torch.FloatStorage") + b"}b"), "no dict"),
    "new object": (state(a=name("collections.OrderedDict") + b")\x81"), "instruction"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "instruction"),
    "object": (b"\x80\x02(" + name("collections.OrderedDict") + b"o.", "instruction"),
    "extension": (b"\x80\x02\x82\x01.", "instruction"),
    "text persistent id": (b"\x80\x02P0\n.", "instruction"),
    "out-of-band buffer": (b"\x80\x05\x97.", "instruction"),
    "protocol 0": (pickle.dumps({"a": 1}, 0), "instruction"),
    "protocol 9": (b"\x80\x09}.", "protocol 9"),
    "no pickle": (b"weights here", "instruction"),
    "empty": (b"", "cut"),
    "only a stop": (b"\x80\x02.", "empty stack"),
    "unfinished": (state(a=tensor())[:-1], "cut"),
    "a list": (b"\x80\x02].", "not a dictionary"),
    "a tensor alone": (b"\x80\x02" + tensor() + b".", "not a dictionary"),
    "no tensors": (state(a=integer(1)), "no tensors"),
    "no entries": (b"\x80\x02}.", "nothing"),
    "long string": (b"\x80\x02X\xff\xff\xff\xff.", "cut"),
    "longer string": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "cut"),
    "bad text": (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "damaged"),
    "long integer": (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "integer of 255 bytes"),
    "longest integer": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "instruction"),
    "frame": (b"\x80\x04\x95" + b"\xff" * 8, "cut"),
    "name without end": (b"\x80\x02c" + b"x" * 10_000, "without an end"),
    "memo bomb": (b"\x80\x02]q\0" + b"h\0h\0\x86q\0" * 100 + b".", "not a dictionary"),
    "memo hole": (b"\x80\x02j\xff\xff\xff\xff.", "damaged"),
    "memo of nothing": (b"\x80\x02q\0.", "damaged"),
    "deep tuples": (deep(b"", b"\x85"), "not a dictionary"),
    "deep lists": (deep(b"]", b"a"), "not a dictionary"),
    "inside itself": (b"\x80\x02}q\0" + word("a") + b"h\0s.", "no tensors"),
    "tuple as a key": (b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0Ns.", "has a tuple as a key"),
    "equal keys": (b"\x80\x02}(" + (word("a") + tensor()) * 2 + b"u.", "'a' twice"),
    "key without value": (b"\x80\x02}(" + word("a") + b"u.", "without a value"),
    "mark below": (b"\x80\x02}(" + word("a") + b"s.", "damaged|empty stack|no dict"),
    "no mark": (b"\x80\x02}u.", "damaged"),
    "pop below a mark": (b"\x80\x02}N(\x85.", "empty stack"),
    "endless": (b"\x80\x02}" + b"N" * (torch_pickle.INSTRUCTIONS + 9), "instructions"),
    "many dictionaries": (b"\x80\x02" + b"}" * 3_000_000 + b".", "instructions"),
    "giant": (b"\x80\x02" + b"N" * (torch_pickle.LONGEST + 1), "wanted at most"),
}

TENSORS = {
    "offset beyond": (tensor((1,), (1,), offset=6), "ends at number 7 of 6"),
    "shape beyond": (tensor((7,), (1,)), "ends at number 7 of 6"),
    "stride beyond": (tensor((2, 3), (4, 1)), "ends at number 7 of 6"),
    "huge shape": (tensor((2**40, 2**40), (2**40, 1)), "ends at number"),
    "huge shape of stride 0": (tensor((2**40, 2**40), (0, 0)), "repeats its storage"),
    "expanded": (tensor((2, 6), (0, 1)), "repeats its storage"),
    "negative offset": (tensor((1,), (1,), offset=-1), "offset is -1"),
    "negative size": (tensor((-1,), (1,)), "size is -1"),
    "two negative sizes": (tensor((-2, -3), (3, 1)), "size is -2"),
    "negative stride": (tensor((6,), (-1,), offset=5), "stride is -1"),
    "negative storage": (tensor((0,), (1,), stored=-6), "length of a storage is -6"),
    "storage of another length": (tensor((6,), (1,), stored=7), "has 24 bytes"),
    "long storage": (tensor((6,), (1,), stored=2**40), "has 24 bytes"),
    "strides too few": (tensor((2, 3), (1,)), "do not fit each other"),
    "too many axes": (tensor((1,) * 40, (1,) * 40), "do not fit each other"),
    "size as truth": (tensor().replace(counts((6,)), b"\x88\x85", 1), "size is True"),
    "size as text": (tensor().replace(counts((6,)), word("6") + b"\x85", 1), "size is '6'"),
    "shape as a list": (tensor().replace(counts((6,)), b"]", 1), "do not fit each other"),
    "storage that is not there": (tensor(key="1"), "which the archive lacks"),
    "storage elsewhere": (tensor(key="../../../etc/passwd"), "which the archive lacks"),
    "storage with a number": (tensor().replace(word("0"), b"K\0", 1), "a storage has class"),
    "storage of a wrong class": (tensor(kind="collections.OrderedDict"), "class collections.OrderedDict"),
    "storage of an unknown class": (tensor(kind="torch.QInt8Storage"), "'torch.QInt8Storage'"),
    "untyped storage": (tensor(kind="torch.storage.UntypedStorage"), "wanted a typed storage"),
    "no storage": (name("torch._utils._rebuild_tensor_v2") + b"(NK\0))tR", "made of a NoneType"),
    "few arguments": (name("torch._utils._rebuild_tensor_v2") + b")R", "0 arguments"),
    "parameter of nothing": (name("torch._utils._rebuild_parameter") + b"(N\x89NtR", "made of a NoneType"),
    "module as reference": (b"(" + word("module") + b"NNNNtQ", "no storage"),
    "short reference": (b"(" + word("storage") + b"tQ", "no storage"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_hostile_pickle_costs_one_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    program, message = PICKLES[case]
    got = refusal(archive(tmp_path / "m.pt", program))
    assert any(part in got for part in message.split("|")), got
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("case", TENSORS)
def test_a_hostile_tensor_costs_one_line(tmp_path, case):
    value, message = TENSORS[case]
    assert message in refusal(archive(tmp_path / "m.pt", state(fine=tensor(), a=value)))


@pytest.mark.parametrize("case", ["deep lists", "endless", "many dictionaries", "deep tuples"])
def test_the_costliest_pickles_take_less_than_a_second(tmp_path, case):
    path = archive(tmp_path / "m.pt", PICKLES[case][0])
    start = time.process_time()
    with pytest.raises(UserError):
        TorchTensors(path)
    assert time.process_time() - start < 1


GOOD = state(a=tensor())


def zip_cases():
    """name → (how the file is made, what is said of it)."""

    def twice(path):
        with pytest.warns(UserWarning, match="Duplicate"):
            archive(path, GOOD, extra=[("data/0", NUMBERS.tobytes())])

    def bomb(path):
        archive(path, GOOD, {"0": bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED)

    def cut(path):
        archive(path, GOOD)
        path.write_bytes(path.read_bytes()[:-30])

    def patched(pattern, replacement, which=-1):
        def make(path):
            data = archive(path, GOOD).read_bytes()
            at = [i for i in range(len(data)) if data.startswith(pattern, i)][which]
            path.write_bytes(data[:at] + replacement(data[at : at + 100]) + data[at + 100 :])

        return make

    def field(at, value):
        return lambda part: part[:at] + value + part[at + len(value) :]

    end, entry, local = b"PK\5\6", b"PK\1\2", b"PK\3\4"
    return {
        "two of one name": (twice, "twice"),
        "a bomb": (bomb, "compressed"),
        "cut": (cut, "cut"),
        "ten million members": (patched(end, field(8, b"\xfe\xff\xfe\xff")), "impossible|damaged"),
        "a directory beyond the end": (patched(end, field(12, struct.pack("<I", 2**31))), "impossible"),
        "a directory elsewhere": (patched(end, field(16, struct.pack("<I", 3))), "damaged"),
        "several disks": (patched(end, field(4, b"\1\0")), "several parts"),
        "wide without a locator": (patched(end, field(12, b"\xff" * 8)), "locator"),
        "encrypted": (patched(entry, field(8, b"\1\0")), "encrypted"),
        "a member beyond the end": (patched(entry, field(20, struct.pack("<2I", 2**30, 2**30))), "beyond"),
        "a header beyond the end": (patched(entry, field(42, struct.pack("<I", 2**30))), "beyond"),
        "a header elsewhere": (patched(entry, field(42, struct.pack("<I", 5))), "no header"),
        "another name in the header": (patched(local, field(30, b"b")), "another name"),
        "a damaged pickle": (patched(b"_rebuild_tensor_v2", lambda part: b"x" + part[1:], 0), "checksum"),
        "no data.pkl": (lambda path: zipfile.ZipFile(path, "w").writestr("a", b""), "called data.pkl"),
        "two data.pkl": (lambda path: archive(path, GOOD, extra=[("b/data.pkl", b"")]), "called data.pkl"),
        "torchscript": (lambda path: archive(path, GOOD, extra=[("constants.pkl", b"")]), "TorchScript"),
        "big-endian": (lambda path: archive(path, GOOD, extra=[("byteorder", b"big")]), "little-endian"),
        "empty archive": (lambda path: zipfile.ZipFile(path, "w").close(), "neither"),
        "empty file": (lambda path: path.write_bytes(b""), "neither"),
        "text": (lambda path: path.write_text("version https://git-lfs"), "neither"),
        "only a beginning": (lambda path: path.write_bytes(b"PK\3\4"), "cut"),
        "only an end": (lambda path: path.write_bytes(b"PK\3\4" + b"PK\5\6" + b"\xff" * 18), "locator"),
        "a bare pickle": (lambda path: path.write_bytes(GOOD), "hub.convert"),
        "a folder": (lambda path: path.mkdir(), "no such file"),
        "nothing": (lambda path: None, "no such file"),
        "a pipe": (os.mkfifo, "no such file"),
    }


@pytest.mark.parametrize("case", zip_cases())
def test_a_hostile_archive_costs_one_line(tmp_path, case):
    make, message = zip_cases()[case]
    make(tmp_path / "m.pt")
    got = refusal(tmp_path / "m.pt")
    assert any(part in got for part in message.split("|")), got


def test_a_directory_of_a_million_members_is_not_read(tmp_path):
    names = b"".join(b"PK\1\2" + bytes(42) for _ in range(torch_archive.MEMBERS + 1))
    wide = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, *[len(names) // 46] * 2, len(names), 4)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, 4 + len(names), 1)
    end = b"PK\5\6" + b"\0" * 4 + b"\xff" * 12 + b"\0\0"
    (tmp_path / "m.pt").write_bytes(b"PK\3\4" + names + wide + locator + end)
    assert "impossible" in refusal(tmp_path / "m.pt")


@pytest.mark.torch
def test_older_files_and_whole_modules_of_torch_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert "hub.convert" in refusal(path, open_tensors)
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in refusal(path, open_tensors)
    torch.save({"a": Run(os.system, "touch owned")}, path)
    assert "posix.system" in refusal(path, open_tensors)


def test_nothing_may_be_named_but_types_storages_and_four_calls():
    """The list is the whole surface: a longer one is a decision, not an accident."""
    assert set(torch_names.CALLS) == {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
    }
    rest = set(torch_names.GLOBALS) - set(torch_names.CALLS)
    assert all(torch_names.GLOBALS[n] is None or isinstance(torch_names.GLOBALS[n], np.dtype) for n in rest)
    for module in (torch_pickle, torch_names, torch_archive, torch_files):
        with open(module.__file__) as file:
            text = file.read()
        assert "import pickle" not in text and "getattr(" not in text and "eval(" not in text


@pytest.mark.slow
def test_random_damage_is_refused_or_harmless(tmp_path):
    """6000 files with one to four bytes changed: each is read or refused in one line, whatever it says."""
    inner = b"}(" + word("w") + tensor() + word("v") + tensor((3, 2), (1, 3)) + b"u"
    data = archive(tmp_path / "good.pt", state(state_dict=inner, epoch=integer(3), a=tensor())).read_bytes()
    fixed = io.BytesIO(data)
    program = zipfile.ZipFile(fixed).read("archive/data.pkl")
    rng = np.random.default_rng(0)
    read = 0
    for round in range(6000):
        target = bytearray(program if round % 2 else data)
        for at in rng.integers(0, len(target), rng.integers(1, 5)):
            target[at] = rng.integers(0, 256)
        path = tmp_path / "m.pt"
        if round % 2:
            archive(path, bytes(target))
        else:
            path.write_bytes(target)
        try:
            reader = TorchTensors(path)
            for key in reader.keys():
                assert reader.tensor(key).size <= 6 * 4
            reader.fingerprint()
            read += 1
        except UserError as error:
            assert "\n" not in error.line
    assert 100 < read < 5000
