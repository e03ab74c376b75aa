"""Attention by its definition, every implementation against it, and who gets which."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import attention
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.runtime import hlo
from smart_grpo_jax.runtime.mesh import make_mesh

ANYWHERE = ("xla", "chunked")


def arrays(s=7, t=5, h=2, d=4, b=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((b, n, h, d), np.float32), dtype) for n in (s, t, t)]


def by_definition(q, k, v, bias):
    logits = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights, v)


def pull(implementation, q, k, v, bias=None):
    """The gradients of Σ out²."""
    square = lambda *a: (attend(*a, bias, implementation).astype(jnp.float32) ** 2).sum()
    return jax.grad(square, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("shape", [None, (1, 1, 1, 5), (2, 2, 7, 5)])
def test_every_implementation_is_softmax_of_scaled_products(implementation, shape, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)  # 7 queries: two full blocks and a padded one
    q, k, v = arrays()
    bias = None if shape is None else np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    got = attend(q, k, v, bias, implementation)
    want = by_definition(q, k, v, 0.0 if bias is None else bias)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_chunks_keep_the_gradient(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)
    grads = [pull(how, *arrays()) for how in ANYWHERE]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def test_chunks_add_up_gradients_of_keys_in_float32(monkeypatch):
    """64 blocks in bfloat16: a sum in that type would lose what one matmul keeps. The bound is 1.5 times
    the error that one rounding of the result leaves in `xla`."""
    monkeypatch.setattr(attention, "CHUNK", 4)
    exact = pull("xla", *arrays(256, 16))
    grads = [pull(how, *arrays(256, 16, dtype=jnp.bfloat16)) for how in ANYWHERE]
    error = lambda g: np.linalg.norm(np.asarray(g, np.float32) - exact[2]) / np.linalg.norm(exact[2])
    assert error(grads[1][2]) < 1.5 * error(grads[0][2])


def temporary(implementation):
    """Bytes that the compiled gradient needs beside arguments and results."""
    shapes = [jax.ShapeDtypeStruct((2, 1024, 4, 16), np.float32)] * 3
    compiled = jax.jit(lambda *a: pull(implementation, *a)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_gradient_of_chunks_needs_a_part_of_the_memory(monkeypatch):
    """8 blocks of 128: a few times an eighth of the logits. (Forward, a CPU fuses `xla` by itself.)"""
    monkeypatch.setattr(attention, "CHUNK", 128)
    logits = 2 * 4 * 1024 * 1024 * 4
    assert temporary("xla") >= logits
    assert temporary("chunked") < logits / 2


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_rows_and_heads_stay_on_their_devices(implementation, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 8)
    mesh = make_mesh(0, 2, 2, jax.devices()[:8])
    lie = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    there = [jax.device_put(a, lie) for a in arrays(20, 20, 2, 8, b=4)]
    compiled = jax.jit(lambda *a: pull(implementation, *a)).lower(*there).compile()
    assert not hlo.collectives(hlo.parse(compiled.as_text()), dict(mesh.shape))


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(UserError, match='try "chunked"'):
        attend(*arrays(), implementation="chunks")


def aim(platform, dtype="bfloat16", width=64, capability=9.0):
    device = types.SimpleNamespace(platform=platform, compute_capability=str(capability))
    return attention.target(device, dtype, width)


@pytest.mark.parametrize(
    ("where", "want"),
    [
        (aim("tpu"), "splash"),
        (aim("tpu", "float32"), "splash"),
        (aim("gpu"), "cudnn"),
        (aim("cuda", width=128), "cudnn"),
        (aim("gpu", "float32"), "xla"),
        (aim("gpu", width=12), "xla"),
        (aim("gpu", capability=7.5), "xla"),
        (aim("gpu", capability="gfx942"), "xla"),
        (aim("cpu"), "xla"),
    ],
)
def test_auto_follows_the_device_of_the_mesh(where, want):
    assert attention.choose("auto", where) == want
    assert all(attention.choose(name, where) == name for name in (want, *ANYWHERE))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("cudnn", aim("cpu")),
        ("cudnn", aim("gpu", "float32")),
        ("cudnn", aim("tpu")),
        ("splash", aim("gpu")),
        ("splash", aim("cpu", "float32")),
    ],
)
def test_what_a_platform_cannot_run_is_one_line(name, where):
    with pytest.raises(UserError) as caught:
        attention.choose(name, where)
    line = caught.value.line
    assert line.startswith(f"model.attention: got {name}, which needs") and not line.endswith("…")
    valid = line.split("wanted one of ")[1].split(" on ")[0].split(", ")
    assert name not in valid and {"auto", *ANYWHERE} <= set(valid)


def test_the_option_offers_what_is_built():
    choices = configs.Model.__dataclass_fields__["attention"].metadata["choices"]
    assert set(choices) == {"auto", *attention.IMPLEMENTATIONS}
