"""The sharding tables: strict on every published network, and the same numbers on every mesh."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import sharding
from smart_grpo_jax.hub.families import NETWORKS
from smart_grpo_jax.models import presets


class Mesh:
    def __init__(self, fsdp, tensor):
        self.shape = {"data": 1, "fsdp": fsdp, "tensor": tensor}


CASES = [
    (name, part)
    for name in ("sd35-medium", "sd35-large", "flux-dev", "flux-schnell", "tiny", "tiny-flux")
    for part in presets.preset(name)
]


def network(name, part):
    config = presets.preset(name)[part]
    return presets.class_name(part, presets.PRESETS[name][part]), config


@pytest.mark.parametrize(("name", "part"), CASES)
def test_every_leaf_has_a_rule_and_every_rule_a_leaf(name, part):
    class_name, config = network(name, part)
    tails = flatten_dict(sharding.specs(class_name, config), sep="/")
    shapes = flatten_dict(NETWORKS[class_name].table.abstract(config), sep="/")
    for path, tail in tails.items():
        assert len(tail) <= len(shapes[path].shape)


@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large", "flux-dev"])
def test_a_published_transformer_is_spread_almost_whole(name):
    class_name, config = network(name, "transformer")
    tails = flatten_dict(sharding.specs(class_name, config), sep="/")
    shapes = flatten_dict(NETWORKS[class_name].table.abstract(config), sep="/")
    share = whole = 0
    for path, leaf in shapes.items():
        spec = sharding.fitted(tails[path], leaf.shape, Mesh(16, 4))
        ways = np.prod([{"fsdp": 16, "tensor": 4}[axis] for axis in spec if axis], initial=1)
        share += leaf.size / ways
        whole += leaf.size
        assert spec == PartitionSpec() or spec[0] is None or len(leaf.shape) == len(tails[path])
    assert share / whole < 1 / 16 * 1.05


def test_an_axis_that_does_not_divide_stays_whole():
    assert sharding.fitted(sharding.FIRST, (3, 10, 12), Mesh(4, 4)) == PartitionSpec(None, None, "tensor")


def test_an_unknown_class_is_one_line():
    with pytest.raises(UserError, match="UNet"):
        sharding.specs("UNet2DConditionModel", None)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_the_velocity_does_not_depend_on_the_mesh():
    from smart_grpo_jax.hub.pipeline import load_pipeline
    from smart_grpo_jax.runtime.mesh import make_mesh

    def velocity(layout):
        pipe = load_pipeline("shapes", layout=layout)
        x = jax.random.normal(jax.random.key(0), (8, *pipe.latent_shape()))
        cond = pipe.encode(["a photo of a red circle"] * 8, compact=True)
        return np.asarray(pipe.velocity(x, np.full(8, 0.5, np.float32), cond))

    base = velocity(sharding.layout(make_mesh(0, 1, 1, jax.devices()[:1])))
    for fsdp, tensor in ((4, 1), (2, 2), (1, 4)):
        split = velocity(sharding.layout(make_mesh(1, fsdp, tensor, jax.devices()[:4])))
        np.testing.assert_allclose(split, base, atol=1e-5)
