"""What a compiler says of a program, and that it is asked once for each."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from smart_grpo_jax.runtime import aot_measure
from smart_grpo_jax.runtime.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def argument(mesh, rows=64):
    return jax.ShapeDtypeStruct((rows, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))


def branch(scale):
    def step(x):
        tried = lambda a: (a @ a) * scale
        return jax.lax.cond(x[0, 0] > 0, tried, lambda a: a, x)

    return jax.jit(step)


def test_a_program_is_compiled_once_whoever_asks(mesh, tmp_path, monkeypatch):
    first = aot_measure.measure(branch(2.0), [argument(mesh)], mesh, "cpu", 1.0, tmp_path)
    assert first["argument_bytes"] == 4 * 64 * 64 and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
    assert aot_measure.measure(branch(2.0), [argument(mesh)], mesh, "cpu", 1.0, tmp_path) == first
    never = aot_measure.measure(branch(2.0), [argument(mesh)], mesh, "cpu", 0.0, tmp_path)
    assert never["memory_bytes"] < first["memory_bytes"]
    assert never["peak_bytes"] == first["peak_bytes"]
    assert first["never"]["memory_bytes"] == never["memory_bytes"]
    always = aot_measure.measure(branch(2.0), [argument(mesh)], mesh, "cpu", None, tmp_path)
    assert always == {name: value for name, value in first.items() if name != "never"}


@pytest.mark.parametrize("what", ["constant", "shape", "setting", "nowhere"])
def test_what_is_not_the_same_question_is_asked_again(what, mesh, tmp_path, monkeypatch):
    kept = None if what == "nowhere" else tmp_path
    aot_measure.measure(branch(2.0), [argument(mesh)], mesh, "cpu", 1.0, kept)
    if what == "setting":
        monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O2")
    scale, rows = (3.0 if what == "constant" else 2.0), (128 if what == "shape" else 64)
    if rows == 128:
        aot_measure.measure(jax.jit(lambda x: x.T @ x), [argument(mesh, rows)], mesh, "cpu", 1.0, kept)
    else:
        aot_measure.measure(branch(scale), [argument(mesh)], mesh, "cpu", 1.0, kept)
    assert len(list(tmp_path.iterdir())) == (0 if what == "nowhere" else 2)
