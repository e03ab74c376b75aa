import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.fused import Fused, Split, fuse
from smart_grpo_jax.hub.streaming import long_axis

QKV = (Fused(r"(.*)\.qkv\.(weight|bias)", tuple(rf"\1.{n}.\2" for n in "qkv")),)


class Held:
    """A reader of arrays."""

    def __init__(self, arrays):
        self.arrays = arrays

    def keys(self):
        return set(self.arrays)

    def shape(self, key):
        return self.arrays[key].shape

    def tensor(self, key):
        return self.arrays[key]

    def rows(self, key, start, stop):
        axis = long_axis(self.shape(key))
        return self.arrays[key][(slice(None),) * axis + (slice(start, stop),)]

    def file(self, key):
        return "held.pt"


def held(**arrays):
    return Held({name.replace("_", "."): array for name, array in arrays.items()})


WEIGHT = np.arange(36.0).reshape(12, 3)
PLAIN = np.arange(4.0)


def test_parts_are_the_rows_of_the_whole_in_order():
    split = Split(held(a_qkv_weight=WEIGHT, a_qkv_bias=WEIGHT[:, 0], other=PLAIN), QKV)
    assert split.keys() == {*(f"a.{n}.{leaf}" for n in "qkv" for leaf in ("weight", "bias")), "other"}
    for i, name in enumerate("qkv"):
        assert split.shape(f"a.{name}.weight") == (4, 3)
        np.testing.assert_array_equal(split.tensor(f"a.{name}.weight"), WEIGHT[4 * i : 4 * i + 4])
        np.testing.assert_array_equal(split.tensor(f"a.{name}.bias"), WEIGHT[4 * i : 4 * i + 4, 0])
    np.testing.assert_array_equal(split.tensor("other"), PLAIN)
    assert split.file("a.q.weight") == split.file("nobody") == "held.pt"


@pytest.mark.parametrize("shape", [(12, 3), (12,), (3, 7), (3, 1, 5), (6, 1)])
def test_rows_of_a_part_are_rows_of_the_part(shape):
    whole = np.arange(float(np.prod(shape))).reshape(shape)
    split = Split(held(a_qkv_weight=whole), QKV)
    for name in "qkv":
        part = split.tensor(f"a.{name}.weight")
        axis = long_axis(part.shape)
        for start, stop in ((0, 1), (1, part.shape[axis]), (0, part.shape[axis])):
            wanted = part[(slice(None),) * axis + (slice(start, stop),)]
            np.testing.assert_array_equal(split.rows(f"a.{name}.weight", start, stop), wanted)


def test_rows_of_a_tensor_that_is_not_fused_pass_through():
    np.testing.assert_array_equal(Split(held(other=PLAIN), QKV).rows("other", 1, 3), PLAIN[1:3])


def test_to_fuse_is_to_undo_the_split():
    tensors = {"a.qkv.weight": WEIGHT, "other": PLAIN}
    split = Split(Held(tensors), QKV)
    parted = {key: split.tensor(key) for key in split.keys()}
    again = fuse(parted, QKV, ["a.qkv.weight"])
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


@pytest.mark.parametrize("shape", [(11, 3), (0, 3), ()])
def test_a_tensor_without_equal_parts_is_refused(shape):
    with pytest.raises(UserError, match=r"held.pt: 'a.qkv.weight' has shape .*wanted 3 equal parts"):
        Split(held(a_qkv_weight=np.zeros(shape)), QKV)
