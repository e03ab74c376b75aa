"""Names of slices."""

import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime import topologies
from smart_grpo_jax.runtime.topologies import parse


@pytest.mark.parametrize(
    ("text", "kind", "shape", "chips", "hosts"),
    [
        ("v5e:4x4", "v5e", "4x4", 16, 2),
        ("v5e-16", "v5e", "4x4", 16, 2),
        ("v5p:2x2x2", "v5p", "2x2x2", 8, 2),
        ("v5p-16", "v5p", "2x2x2", 8, 2),
        ("v4-8", "v4", "2x2x1", 4, 1),
        ("v6e:16x16", "v6e", "16x16", 256, 32),
        ("2xv5e:16x16", "v5e", "16x16", 512, 64),
        ("cpu:8", "cpu", "", 8, 1),
        ("gpu:h200:16", "h200", "", 16, 2),
    ],
)
def test_a_name_gives_its_slice(text, kind, shape, chips, hosts):
    found = parse(text)
    assert (found.kind, found.shape, found.chips, found.hosts) == (kind, shape, chips, hosts)
    assert parse(found.name.replace("h200:", "gpu:h200:")) == found


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("v5e:3x3", "v5e is sold as 1x1, 2x2"),
        ("v5e-9", "v5e-8"),
        ("v5f:2x2", "v5"),
        ("gpu:h20:8", "h200"),
        ("gpu:h200:", "number of devices"),
        ("cpu:0", "number of devices"),
        ("v5e", "KIND:SHAPE"),
        ("", "KIND:SHAPE"),
        ("0xv5e:2x2", "one slice"),
    ],
)
def test_a_slice_that_nobody_sells_is_one_line_with_the_nearest(text, hint):
    with pytest.raises(UserError, match=hint) as error:
        parse(text)
    assert "\n" not in error.value.line


def test_every_sold_slice_can_be_ordered_by_its_accelerator_type():
    for kind, shapes in topologies.SOLD.items():
        assert [topologies.volume(s) for s in shapes] == sorted({topologies.volume(s) for s in shapes})
        for shape in shapes:
            one = parse(f"{kind}:{shape}")
            assert parse(one.accelerator) == one


def test_neighbours_are_of_the_same_kind_and_in_order():
    here = parse("v6e:4x4")
    assert [t.shape for t in topologies.smaller(here)] == ["2x4", "2x2", "1x1"]
    assert [t.chips for t in topologies.larger(here)] == [32, 64, 128, 256]


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_a_device_is_known_by_the_longest_start_of_its_name(kind, flops):
    assert topologies.chip_of(kind).flops == flops


def test_a_device_that_is_not_in_the_table_is_not_guessed():
    assert topologies.chip_of("cpu") is None
    assert set(topologies.DEVICES.values()) == set(topologies.CHIPS)
