"""Torch files → safetensors, with torch's help."""

import builtins
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import convert
from smart_grpo_jax.hub.torch_files import open_tensors

pytestmark = pytest.mark.torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch):
    base = torch.arange(12.0).reshape(3, 4)
    return {"a": base, "t": base.t(), "bf": base.bfloat16(), "h": base.half(), "ids": torch.arange(5)}


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_older_and_newer_files_become_safetensors_with_the_same_numbers(tmp_path, torch, new, wrapped):
    state = tensors(torch) | {"mask": torch.tensor([True])}
    source, target = tmp_path / "m.pt", tmp_path / "m.safetensors"
    value = {"state_dict": state, "epoch": 3} if wrapped else state
    torch.save(value, source, _use_new_zipfile_serialization=new)
    assert convert.main([str(source), str(target)]) == 0
    reader = open_tensors(target)
    assert reader.keys() == set(state) - {"mask"}
    for key in reader.keys():
        got, want = reader.tensor(key), state[key]
        assert got.dtype.name == str(want.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(got.astype(np.float64), want.double().numpy())
    record = json.loads((tmp_path / "m.safetensors.json").read_text())
    assert record == {
        "source": "m.pt",
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "keys": sorted(reader.keys()),
        "left_out": ["mask"],
    }


def test_it_is_a_command(tmp_path, torch):
    torch.save({"ema": tensors(torch), "epoch": 3}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    command = [sys.executable, "-m", "smart_grpo_jax.hub.convert", str(tmp_path / "m.pt")]
    out = str(tmp_path / "m.safetensors")
    failed = subprocess.run([*command, out], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "--inside=KEY" in failed.stderr and failed.stderr.count("\n") == 1
    done = subprocess.run([*command, out, "--inside=ema"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "5 tensors" in done.stdout, done.stderr
    assert open_tensors(tmp_path / "m.safetensors").keys() == set(tensors(torch))


class Run:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("new", [False, True])
def test_hostile_files_run_nothing_and_cost_one_line(tmp_path, torch, monkeypatch, capsys, new):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Run()}, "evil.pt", _use_new_zipfile_serialization=new)
    assert convert.main(["evil.pt", "m.safetensors"]) == 2
    assert (
        capsys.readouterr().err
        == "evil.pt: torch does not read it with weights_only (it names posix.system)\n"
    )
    assert sorted(os.listdir()) == ["evil.pt"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "EOFError"),
        (b"PK\3\4 and then nothing", "torch does not read it"),
        (b"\x80\x02garbage", "torch does not read it"),
        (None, "no such file"),
    ],
)
def test_damaged_files_cost_one_line(tmp_path, torch, content, message):
    if content is not None:
        (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        convert.convert(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert "\n" not in caught.value.line and not (tmp_path / "m.safetensors").exists()


def test_what_holds_no_state_dict_costs_one_line(tmp_path, torch):
    for value, message in [
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "no tensors at its top"),
        ({"mask": torch.tensor([True])}, "holds no tensor of"),
        (torch.nn.Linear(2, 2), "it names torch.nn.modules.linear.Linear"),
    ]:
        torch.save(value, tmp_path / "m.pt")
        with pytest.raises(UserError, match=message):
            convert.convert(tmp_path / "m.pt", tmp_path / "m.safetensors")
    torch.save(tensors(torch), tmp_path / "m.pt")
    with pytest.raises(UserError, match="no dictionary 'ema'"):
        convert.convert(tmp_path / "m.pt", tmp_path / "m.safetensors", "ema")


def test_nothing_is_overwritten_and_the_name_must_tell_the_format(tmp_path, torch):
    torch.save(tensors(torch), tmp_path / "m.pt")
    (tmp_path / "m.safetensors").write_bytes(b"precious")
    with pytest.raises(UserError, match="is there already"):
        convert.convert(tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == b"precious"
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        convert.convert(tmp_path / "m.pt", tmp_path / "m.bin")


def test_without_torch_one_line_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "m.pt").write_bytes(b"\x80\x02}.")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "torch":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package torch: pip install torch"):
        convert.convert(tmp_path / "m.pt", tmp_path / "m.safetensors")
