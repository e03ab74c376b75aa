"""The implementations of attention beside each other: `python benchmarks/attention.py [--topology=v5e:2x2]`.

Without a topology, the device that is here runs each of them: median milliseconds and TFLOP/s of the
mathematics (4·b·h·s²·d forward, 2.5 times that backward), and the error in the norm against the same inputs
in float32. With a topology, its compiler says what each needs beside arguments and results,
in a process of its own; the rows are those of one device. The default is SD3.5-M at 512 px, 8 images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from smart_grpo_jax.models import attention
from smart_grpo_jax.runtime import aot
from smart_grpo_jax.runtime.topologies import parse

ROOT = Path(__file__).resolve().parents[1]

BACKWARD = 2.5
"""Five products of the size of the forward's two."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per implementation and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topology", default="", help="a slice whose compiler is asked, such as v5e:2x2")
    parser.add_argument("--shape", default="8,1357,24,64", help="images on a device, tokens, heads, features")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    asked = parser.parse_args(argv)
    shape = tuple(map(int, asked.shape.split(",")))
    if asked.topology:
        found = {
            name: ask(name, asked.topology, shape, asked.dtype) for name in names(asked.topology, asked.dtype)
        }
    else:
        device = jax.devices()[0]
        aim = attention.target(device, asked.dtype, shape[-1])
        found = {
            name: timed(name, shape, asked.dtype, asked.repeats)
            for name in attention.IMPLEMENTATIONS
            if name not in attention.NEEDS or attention.NEEDS[name].met(aim)
        }
    for name, row in found.items():
        print(f"{name:8} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps({"shape": shape, "dtype": asked.dtype, "where": asked.topology or "here", **found}))
    return 0


def names(topology: str, dtype: str) -> list[str]:
    """What a slice can run."""
    platform = "cpu" if parse(topology).kind == "cpu" else "tpu"
    aim = attention.Target(platform, 0.0, dtype, 64)
    return [n for n in attention.IMPLEMENTATIONS if n not in attention.NEEDS or attention.NEEDS[n].met(aim)]


def both_ways(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward pass, and forward with backward."""

    def forward(q: Any, k: Any, v: Any) -> Any:
        return attention.attend(q, k, v, None, name)

    def gradient(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(cotangent)

    return forward, gradient


def timed(name: str, shape: tuple[int, ...], dtype: str, repeats: int) -> dict[str, Any]:
    """Medians on the device that is here."""
    b, s, h, d = shape
    rng = np.random.default_rng(0)
    exact = [jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(4)]
    given = [a.astype(dtype) for a in exact]
    flops = 4.0 * b * h * s * s * d
    row: dict[str, Any] = {}
    forward, gradient = map(jax.jit, both_ways(name))
    for label, fn, args, work in (
        ("forward", forward, given[:3], flops),
        ("gradient", gradient, given, flops * (1 + BACKWARD)),
    ):
        jax.block_until_ready(fn(*args))
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            jax.block_until_ready(fn(*args))
            seconds.append(time.perf_counter() - started)
        middle = statistics.median(seconds)
        row |= {f"{label}_ms": round(middle * 1e3, 3), f"{label}_tflops": round(work / middle / 1e12, 1)}
    with jax.default_matmul_precision("highest"):
        rounded = [a.astype(jnp.float32) for a in given[:3]]
        want = jax.jit(both_ways("chunked")[0])(*rounded)
    row["error"] = float(jnp.linalg.norm(forward(*given[:3]) - want) / jnp.linalg.norm(want))
    return row


def ask(name: str, topology: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """MiB beside arguments and results, from a compiler in a child."""
    request = {"name": name, "topology": topology, "shape": shape, "dtype": dtype}
    env = aot.environment(parse(topology), exact=False)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    outcome = aot.child("benchmarks.attention", request, env, 600)
    return dict(outcome.found) or {"verdict": outcome.verdict, "reason": outcome.reason}


def compile_it(request: str, result: str) -> None:
    """The child."""
    asked = json.loads(Path(request).read_text())
    topology = parse(asked["topology"])
    mesh = aot.mesh_of(topology, 0, 1, 1)
    b, *rest = asked["shape"]
    lie = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((b * mesh.size, *rest), jnp.dtype(asked["dtype"]), sharding=lie)
    platform, found = "cpu" if topology.kind == "cpu" else "tpu", {}
    for label, fn, count in zip(("forward", "gradient"), both_ways(asked["name"]), (3, 4), strict=True):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(fn).trace(*[x] * count)
        memory = traced.lower(lowering_platforms=(platform,)).compile().memory_analysis()
        assert memory is not None
        found[f"{label}_MiB"] = round(memory.temp_size_in_bytes / 2**20)
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
        compile_it(*sys.argv[1:])
    else:
        sys.exit(main())
