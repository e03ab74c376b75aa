"""State dicts written without torch, read by torch and by our own reader."""

import ml_dtypes
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import torch_files, torch_write

RNG = np.random.default_rng(0)
TENSORS = {
    "blip.a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "half": RNG.normal(size=(2, 1, 5)).astype(np.float16),
    "brain": RNG.normal(size=7).astype(ml_dtypes.bfloat16),
    "scale": np.float32(4.5).reshape(()),
    "turned": RNG.normal(size=(4, 6)).astype(np.float32).T,
    "ids": np.arange(5)[None],
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.torch
def test_torch_reads_what_is_written_with_its_restricted_loader(tmp_path):
    import torch

    torch_write.write(tmp_path / "a.pt", TENSORS)
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(read) == list(TENSORS)
    for key, array in TENSORS.items():
        assert tuple(read[key].shape) == array.shape
        np.testing.assert_array_equal(read[key].double().numpy(), array.astype(np.float64))


def test_our_reader_reads_what_is_written(tmp_path):
    torch_write.write(tmp_path / "a.pt", TENSORS)
    reader = torch_files.open_tensors(tmp_path / "a.pt")
    assert reader.keys() == set(TENSORS)
    for key, array in TENSORS.items():
        np.testing.assert_array_equal(reader.tensor(key), array)
        assert reader.tensor(key).dtype == array.dtype


def test_equal_tensors_make_equal_files(tmp_path):
    for name in "ab":
        torch_write.write(tmp_path / name, TENSORS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_type_without_a_storage_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="complex64"):
        torch_write.write(tmp_path / "a.pt", {"x": np.zeros(2, np.complex64)})
