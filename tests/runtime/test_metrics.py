import json
import sys
import threading
import types

import numpy as np
import pytest

from smart_grpo_jax.runtime import events
from smart_grpo_jax.runtime.metrics import MetricLog, encode, read


def log(folder, resume_epoch=None, **options):
    return MetricLog(folder, **{"tensorboard": False, "resume_epoch": resume_epoch, **options})


def write(folder, epochs, resume_epoch=None):
    with log(folder, resume_epoch) as metrics:
        for epoch in epochs:
            metrics.write(epoch, 2 * epoch, {"train/reward": epoch / 3, "nfe/velocity": 10 * epoch})


def test_equal_numbers_give_equal_bytes():
    line = encode(3, 6, {"b": np.float32(0.1), "a": 2, "c": np.float64(1) / 3})
    assert line == ('{"epoch": 3, "step": 6, "a": 2, "b": 0.10000000149011612, "c": 0.3333333333333333}')
    assert line == encode(np.int32(3), 6, {"c": 1 / 3, "b": float(np.float32(0.1)), "a": np.int64(2)})


def test_what_is_no_number_is_null_and_says_so():
    row = json.loads(encode(1, 1, {"loss": float("nan"), "kl": np.float32("inf"), "x": 1.0}))
    assert row["loss"] is None and row["loss/nonfinite"] is True
    assert row["kl"] is None and row["kl/nonfinite"] is True
    assert "x/nonfinite" not in row


def test_a_line_is_there_when_write_returns(tmp_path):
    with log(tmp_path) as metrics:
        metrics.write(0, 0, {"a": 1.0})
        assert read(tmp_path) == metrics.state_lines() == [{"epoch": 0, "step": 0, "a": 1.0}]


def test_a_resumed_run_is_cut_back_to_its_checkpoint(tmp_path):
    write(tmp_path, range(1, 6))
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"epoch": 6, "st')  # killed in the middle of a line
    assert [row["epoch"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    write(tmp_path, range(4, 6), resume_epoch=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    lost = (tmp_path / "metrics.lost-1.jsonl").read_bytes()
    assert lost.startswith(b'{"epoch": 4') and lost.endswith(b'{"epoch": 6, "st')
    write(tmp_path, [], resume_epoch=5)
    assert not (tmp_path / "metrics.lost-2.jsonl").exists()  # nothing was lost
    write(tmp_path, [1])
    assert len(read(tmp_path)) == 1 and len(read(tmp_path / "metrics.lost-2.jsonl")) == 5


def test_a_line_without_its_end_is_written_again(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # complete but for the line break: the next line would join it
    write(tmp_path, [3], resume_epoch=2)
    assert [row["epoch"] for row in read(path)] == [1, 3]


def test_without_tensorboard_one_line_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it raises ImportError
    said = []
    with log(tmp_path, tensorboard=True, say=said.append) as metrics:
        for epoch in range(3):
            metrics.write(epoch, epoch, {"a": 1.0})
            metrics.images(epoch, "samples", np.zeros((1, 2, 2, 3)))
    assert len(said) == 1
    assert said[0].startswith("TensorBoard events are off: ")
    assert said[0].endswith("(pip install smart_grpo_jax[tensorboard]); metrics.jsonl has everything")
    assert len(read(tmp_path)) == 3


class FakeWriter:
    def __init__(self, folder):
        self.folder, self.calls = folder, []
        FakeWriter.made[folder.rsplit("tensorboard", 1)[1]] = self
        with open(f"{folder}/events.out.tfevents.1" if "images" not in folder else "/dev/null", "w"):
            pass

    def write_scalars(self, step, values):
        self.calls.append((step, values))

    write_images = write_scalars

    def flush(self):
        pass

    def close(self):
        self.calls.append("closed")


@pytest.fixture
def fake_tensorflow(monkeypatch):
    hidden = []
    config = types.SimpleNamespace(set_visible_devices=lambda devices, kind: hidden.append((devices, kind)))
    modules = {
        "tensorflow": types.SimpleNamespace(config=config),
        "clu.metric_writers": types.SimpleNamespace(SummaryWriter=FakeWriter),
    }

    imported = threading.Event()

    def slow_import(name):
        assert imported.wait(60)
        return modules[name]

    FakeWriter.made = {}
    monkeypatch.setattr(events.importlib, "import_module", slow_import)
    return types.SimpleNamespace(hidden=hidden, imported=imported)


def test_tensorboard_is_rebuilt_from_the_lines_that_were_kept(tmp_path, fake_tensorflow):
    write(tmp_path, [1, 2, 3])
    stale = tmp_path / "tensorboard" / "events.out.tfevents.0"
    stale.parent.mkdir()
    stale.write_text("epoch 3 of the life that was lost")
    metrics = log(tmp_path, resume_epoch=2, tensorboard=True)
    metrics.write(3, 7, {"train/reward": float("nan"), "x": 0.5})
    metrics.images(3, "samples", np.ones((1, 2, 2, 3)))
    fake_tensorflow.imported.set()  # all of the above did not wait for it
    metrics.close()
    assert not stale.exists()
    scalars = FakeWriter.made[""].calls
    assert [call[0] for call in scalars[:-1]] == [1, 2, 3] and scalars[-1] == "closed"
    assert scalars[2][1] == {"step": 7.0, "x": 0.5}
    assert FakeWriter.made["/images"].calls[0][0] == 3
    assert fake_tensorflow.hidden == [([], "GPU"), ([], "TPU")]  # the accelerators are JAX's


def test_a_writer_that_breaks_does_not_break_the_run(tmp_path, fake_tensorflow, monkeypatch):
    def broken(self, step, values):
        raise RuntimeError("disk full\nor worse")

    monkeypatch.setattr(FakeWriter, "write_scalars", broken)
    fake_tensorflow.imported.set()
    said = []
    with log(tmp_path, tensorboard=True, say=said.append) as metrics:
        metrics.write(1, 1, {"a": 1.0})
    assert len(said) == 1 and "disk full or worse" in said[0]
    assert len(read(tmp_path)) == 1
