"""The kernels of devices against two matmuls and a softmax; splash runs as its definition (interpret mode).

Tolerances are relative errors in the norm. float32: 2e-6, sums of up to 384 terms in another order. bfloat16
has 8 bits: the output is rounded once on either side (2^-9), and a gradient passes three roundings.
"""

import functools
import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.maths import flops
from smart_grpo_jax.models import attention, attention_kernels, presets
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.models.mmdit import MMDiT
from smart_grpo_jax.runtime import aot
from smart_grpo_jax.runtime.topologies import parse

ROOT = Path(__file__).parents[2]
TOLERANCE = {"float32": (2e-6, 5e-6), "bfloat16": (4e-3, 1e-2)}
"""(forward, gradient)."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    slow = functools.partial(attention_kernels.splash, interpret=True)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "splash", slow)


def arrays(b, s, t, h, d, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((b, n, h, d), np.float32), dtype) for n in (s, t, t)]


@functools.partial(jax.jit, static_argnums=0)
def both_ways(implementation, arrays, bias=None):
    """The output, and the gradients for a random cotangent."""
    q = arrays[0]
    out, pull = jax.vjp(lambda *a: attend(*a, bias, implementation), *arrays)
    cotangent = np.random.default_rng(9).standard_normal(q.shape, np.float32)
    return out, *pull(jnp.asarray(cotangent, q.dtype))


def off(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def repeats(t, n=256):
    """log n on one key, as the networks give it."""
    return jnp.zeros((1, 1, 1, t)).at[..., t // 2].set(np.log(n))


CASES = {
    "one padded block, 64 features": (2, 37, 37, 3, 64, "float32", False),
    "one padded block, 64 features, a repeated key": (2, 37, 37, 3, 64, "bfloat16", True),
    "fewer queries than keys, 128 features": (1, 130, 300, 2, 128, "bfloat16", False),
    "several blocks of queries, a repeated key": (3, 520, 100, 1, 64, "float32", True),
    "several blocks of keys, nothing padded": (1, 128, 1024, 1, 64, "float32", False),
    "few features": (2, 9, 9, 2, 8, "float32", True),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_is_attention_forward_and_backward(name):
    *sizes, dtype, repeated = CASES[name]
    given, bias = arrays(*sizes, dtype), repeats(sizes[2]) if repeated else None
    got, want = both_ways("splash", given, bias), both_ways("xla", given, bias)
    forward, backward = TOLERANCE[dtype]
    assert off(got[0], want[0]) < forward
    for one, other in zip(got[1:], want[1:], strict=True):
        assert off(one, other) < backward


def test_rollout_and_gradient_see_the_same_numbers():
    """Ratio 1: the forward pass under a gradient, and a row beside other rows, to the bit."""
    given = arrays(2, 40, 40, 2, 64, "bfloat16")
    run = jax.jit(lambda *a: attend(*a, None, "splash"))
    plain = run(*given)
    np.testing.assert_array_equal(plain, both_ways("splash", given)[0])
    np.testing.assert_array_equal(plain[1:], run(*(a[1:] for a in given)))
    np.testing.assert_array_equal(plain, run(*given))


@pytest.mark.slow
def test_splash_lives_in_remat_scan_and_vmap():
    q, k, v = arrays(2, 20, 20, 2, 16)

    def layers(how, q):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, _):
            return x + attend(x, k, v, None, how), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, q, None, length=2)[0]))

    got, want = (jax.jit(jax.grad(functools.partial(layers, how)))(q) for how in ("splash", "xla"))
    assert off(got, want) < TOLERANCE["float32"][1]
    states = jnp.stack([q, 2 * q])
    got, want = (
        jax.jit(jax.vmap(lambda x, how=how: attend(x, k, v, None, how)))(states) for how in ("splash", "xla")
    )
    assert off(got, want) < TOLERANCE["float32"][0]


@pytest.mark.slow
def test_a_network_and_its_adapter_learn_alike_through_splash():
    """Dual, joint and last blocks, scanned and recomputed, with a repeated text token."""
    config = presets.preset("tiny")["transformer"]
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    x, t, tokens = normal(2, 4, 4, config.in_channels), jnp.array([0.3, 0.8]), normal(2, 5, 24)
    inputs = (x, t, tokens, normal(2, config.pooled_projection_dim))
    nets = [
        MMDiT(config, lora_rank=2, lora_alpha=2.0, remat="full", attention=how) for how in ("splash", "xla")
    ]
    shapes = jax.eval_shape(nets[1].init, jax.random.key(0), *inputs)
    variables = jax.tree.map(lambda a: 0.3 * normal(*a.shape), shapes)

    def loss(net, lora):
        v = net.apply({**variables, "lora": lora}, *inputs, repeats=9)
        return jnp.sum(jnp.sin(v)), v

    run = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (got, v), (want, expected) = (run(net, variables["lora"]) for net in nets)
    assert off(v, expected) < 1e-5  # some layers on, and gradients through them
    flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    assert off(flat(got), flat(want)) < 1e-4 and jnp.linalg.norm(flat(want)) > 1e-3


@pytest.mark.parametrize(
    ("tokens", "want"),
    [(1, (128, 128)), (128, (128, 128)), (154, (256, 256)), (1102, (384, 1152)), (1357, (512, 1536)),
     (1024, (512, 1024)), (1536, (512, 1536)), (4096, (512, 4096)), (4429, (512, 4608))],
)  # fmt: skip
def test_the_block_pads_least(tokens, want):
    assert attention_kernels.tiles(tokens) == want


def test_a_bias_in_the_features_keeps_its_bits():
    """log 256 = 5.545 has no bfloat16 within 0.01; three have it within 1e-6. -inf masks."""
    q, k, _ = arrays(1, 3, 5, 2, 64, "bfloat16")
    bias = repeats(5).at[..., 0].set(-jnp.inf)
    longer = attention_kernels.folded(q, k, bias)
    products = lambda q, k: jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    added = products(*longer) - products(q, k)
    assert jnp.abs(added - bias)[..., 1:].max() < 1e-5  # products of 64 terms up to 30, in float32
    assert added[..., 0].max() < -1e37


@pytest.mark.parametrize("how", ["splash", "cudnn"])
def test_a_bias_of_each_query_is_left_to_chunks(how):
    q, k, v = arrays(1, 6, 6, 2, 8)
    causal = jnp.triu(jnp.full((6, 6), -jnp.inf), 1)[None, None]
    assert off(attend(q, k, v, causal, how), attend(q, k, v, causal)) < TOLERANCE["float32"][0]


@pytest.mark.parametrize("repeated", [False, True])
def test_cudnn_is_asked_for_what_it_can_do(repeated, monkeypatch):
    """Heads of a multiple of 8 features, one type, no bias; what XLA makes of the same call is attention."""
    calls, own = [], jax.nn.dot_product_attention

    def instead(q, k, v, *, scale, implementation):
        calls.append((q, k, v, implementation))
        return own(q, k, v, scale=scale, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    given, bias = arrays(2, 7, 9, 2, 64, "bfloat16"), repeats(9) if repeated else None
    got, want = both_ways("cudnn", given, bias), both_ways("xla", given, bias)
    for one, other in zip(got, want, strict=True):
        assert off(one, other) < TOLERANCE["bfloat16"][1]
    *there, implementation = calls[0]
    assert implementation == "cudnn"
    assert {(a.shape[-1] % 8, a.shape[-1], a.dtype.name) for a in there} == {
        (0, 72 if repeated else 64, "bfloat16")
    }


ON_A_MESH = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from smart_grpo_jax.models import attention_kernels
from smart_grpo_jax.models.attention import xla
from smart_grpo_jax.runtime import hlo
from smart_grpo_jax.runtime.mesh import make_mesh

fn = functools.partial(attention_kernels.splash, interpret=True)
rng = np.random.default_rng(0)
found = []
# rows and heads divide; heads do not; rows divide over `data` alone
for rows, heads in ((8, 2), (4, 3), (2, 2)):
    mesh = make_mesh(2, 2, 2)
    q, k, v, c = (rng.standard_normal((rows, 20, heads, 16), np.float32) for _ in range(4))
    bias = jnp.zeros((1, 1, 1, 20)).at[..., 7].set(3.0)

    def both(how, q, k, v, c):
        out, pull = jax.vjp(lambda *a: how(*a, bias, 0.25), q, k, v)
        return out, *pull(c)

    axes = attention_kernels.dividing(rows, ("data", "fsdp"), dict(mesh.shape))
    lie = NamedSharding(mesh, PartitionSpec(axes, None, "tensor" if heads % 2 == 0 else None))
    there = [jax.device_put(a, lie) for a in (q, k, v, c)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(lambda *a: both(fn, *a)).lower(*there).compile()
    got, want = compiled(*there), jax.jit(lambda *a: both(xla, *a))(q, k, v, c)
    sent = hlo.collectives(hlo.parse(compiled.as_text()), dict(mesh.shape))
    error = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(got, want))
    found.append({"error": error, "sent": [one.kind for one in sent]})
json.dump(found, open(sys.argv[1], "w"))
"""


def child(tmp_path, code, env, *words):
    """Run a program in a process of its own and read what it found."""
    script, answer = tmp_path / "child.py", tmp_path / "found.json"
    script.write_text(textwrap.dedent(code))
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-W", "ignore", str(script), str(answer), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert answer.is_file(), done.stderr[-2000:]
    return json.loads(answer.read_text())


@pytest.mark.slow
def test_on_a_mesh_every_device_keeps_its_rows_and_heads(tmp_path):
    """8 devices, data 2 × fsdp 2 × tensor 2. Where heads do not divide, gradients are summed over `tensor`;
    nothing is ever gathered."""
    found = child(tmp_path, ON_A_MESH, aot.environment(parse("cpu:8"), exact=False))
    assert [one["error"] < TOLERANCE["float32"][1] for one in found] == [True] * 3
    assert found[0]["sent"] == []
    assert not {"all-gather", "all-to-all"} & {op for one in found for op in one["sent"]}


FOR_A_TPU = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from smart_grpo_jax.models.attention import attend
from smart_grpo_jax.runtime import aot, hlo
from smart_grpo_jax.runtime.topologies import parse

found = {}
for name in sys.argv[2:]:
    mesh = aot.mesh_of(parse(name), 0, 1, 1)
    lie = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((2 * mesh.size, 300, 2, 64), jnp.bfloat16, sharding=lie)

    def both(how, q, k, v, c):
        bias = jnp.zeros((1, 1, 1, 300)).at[..., 7].set(3.0)
        out, pull = jax.vjp(lambda *a: attend(*a, bias, how), q, k, v)
        return out, *pull(c)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(lambda *a: both("splash", *a)).trace(x, x, x, x)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    sent = hlo.collectives(hlo.parse(text), dict(mesh.shape))
    found[name] = {"kernels": text.count("tpu_custom_call"), "sent": [one.kind for one in sent]}
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
def test_splash_compiles_for_the_tpus_that_are_sold(tmp_path):
    slices = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    found = child(tmp_path, FOR_A_TPU, aot.environment(parse(slices[0]), exact=False), *slices)
    for name in slices:
        assert found[name]["kernels"] >= 3 and found[name]["sent"] == []  # forward, dq, dk with dv


@pytest.mark.parametrize(("tokens", "blocks"), [(1024, 1024), (1357, 1536)])
def test_the_counter_sees_the_products_of_the_kernel(tokens, blocks):
    """Two products of the padded lengths; what a model asks for is counted on `xla`."""
    x = jax.ShapeDtypeStruct((2, tokens, 3, 64), jnp.bfloat16)
    run = lambda how: flops.count(lambda *a: attend(*a, None, how), x, x, x)
    assert run("splash") == 4 * 2 * 3 * blocks**2 * 64
    assert run("xla") == 4 * 2 * 3 * tokens**2 * 64
