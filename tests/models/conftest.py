"""PyTorch as an oracle: random models, their tensors, and one way to compare."""

import types

import numpy as np
import pytest

from smart_grpo_jax.hub.streaming import long_axis


class StateDict:
    """The tensors of a torch module as a reader of weight tables."""

    def __init__(self, module):
        self.state = {k: v.detach().numpy() for k, v in module.state_dict().items()}

    def keys(self):
        return set(self.state)

    def shape(self, key):
        return self.state[key].shape

    def tensor(self, key):
        return self.state[key]

    def rows(self, key, start, stop):
        axis = long_axis(self.shape(key))
        return self.state[key][(slice(None),) * axis + (slice(start, stop),)]

    def file(self, key):
        return "state_dict"


def difference(ours, theirs):
    """The relative error in the norm and in the maximum, the larger of the two."""
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().numpy().astype(np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 1e-3
    error = ours - theirs
    in_norm = np.linalg.norm(error) / np.linalg.norm(theirs)
    return max(in_norm, np.abs(error).max() / np.abs(theirs).max())


def assert_close(ours, theirs, tolerance):
    """Relative error in the norm and in the maximum."""
    assert difference(ours, theirs) <= tolerance


@pytest.fixture(scope="session")
def wrong():
    """Mistakes that are easily made in a port; a tolerance that lets them pass proves nothing."""
    import jax

    from smart_grpo_jax.models import layers

    def swapped(build, x, temb, name):
        """Shift before scale in the last norm, as in the norms of the blocks."""
        first, second = layers.Modulation(build, 2, name=name)(temb)
        shift, scale = (first, second) if name == "norm_out" else (second, first)
        return layers.modulated(layers.layer_norm(x), shift, scale)

    return types.SimpleNamespace(gelu=lambda x: jax.nn.gelu(x, approximate=False), continuous=swapped)


@pytest.fixture(scope="session")
def oracle():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    def random(module, seed=0):
        """Every parameter random and of unit gain, so that no branch hides behind a zero gate."""
        generator = torch.Generator().manual_seed(seed)
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.2 * noise + float(name.endswith("weight")))
        return module.eval()

    return types.SimpleNamespace(
        random=random,
        reader=StateDict,
        torch=lambda a: torch.from_numpy(np.array(a)),
        assert_close=assert_close,
        difference=difference,
    )
