"""What loading costs: `python benchmarks/loading.py [--gigabytes=2]`.

A synthetic SD3-shaped checkpoint of that size (bfloat16, two shards) is written to a temporary folder and
loaded in a fresh process whose peak memory is read afterwards. On a CPU the parameters themselves lie in
the same memory; they are taken off. Wanted: 1.2 × the largest tensor + 1 GB; exit code 1 above it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ml_dtypes
import numpy as np

HEADS = {0.25: 5, 0.5: 8, 1.0: 11, 2.0: 16, 4.0: 23}
"""Gigabytes → heads of 64 features; width and bytes follow."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write, load elsewhere, compare with the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, choices=list(HEADS))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(load(Path(arguments.load), arguments.dtype)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        size, largest = write(Path(scratch), HEADS[arguments.gigabytes])
        command = [sys.executable, __file__, f"--load={scratch}", f"--dtype={arguments.dtype}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    over, bound = found["peak"] - found["before"] - found["params"], 1.2 * largest + 1e9
    print(
        f"{size / 1e9:.2f} GB in {found['seconds']:.1f} s ({size / found['seconds'] / 1e9:.2f} GB/s), "
        f"largest tensor {largest / 1e9:.2f} GB\npeak beyond the parameters {over / 1e9:.2f} GB, wanted ≤ "
        f"{bound / 1e9:.2f} GB"
    )
    print(json.dumps({**found, "file": size, "largest": largest, "beyond": over, "bound": bound}))
    return int(over > bound)


def write(root: Path, heads: int) -> tuple[int, int]:
    """A random transformer; (bytes of all tensors, of the largest)."""
    from smart_grpo_jax.hub import export, tables, weights
    from smart_grpo_jax.models.mmdit import MMDiTConfig

    settings: dict[str, Any] = {
        "num_layers": 24,
        "num_attention_heads": heads,
        "caption_projection_dim": 64 * heads,
        "dual_attention_layers": tuple(range(13)),
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
    }
    config = MMDiTConfig(**settings)
    # Every layer of a stack is a view of the same numbers: what is large lies on the disk alone.
    leaf_of = {place.path: place for place in tables.places(weights.MMDIT, config)}

    def leaf(path: str) -> np.ndarray:
        place = leaf_of[path]
        one = np.random.default_rng(0).standard_normal(place.shape, np.float32).astype(ml_dtypes.bfloat16)
        return np.broadcast_to(one, (len(place.keys), *place.shape)) if place.stacked else one

    shard = 2 * 10**9
    export.write_transformer(
        root / "transformer", weights.MMDIT, config, settings, leaf, ml_dtypes.bfloat16, shard
    )
    sizes = [2 * int(np.prod(shape)) for _, shape, _ in tables.lazily(weights.MMDIT, config, leaf)]
    return sum(sizes), max(sizes)


def load(root: Path, dtype: str) -> dict[str, float]:
    """Peak memory of this process around the load, and what the parameters take."""
    import jax
    import jax.numpy as jnp

    from smart_grpo_jax.hub import folder

    jax.block_until_ready(jnp.zeros(3) + 1)
    before = peak()
    started = time.monotonic()
    name = "SD3Transformer2DModel"
    config = folder.read_config(root, "transformer", name)
    params = folder.read_params(root, "transformer", name, config, folder.compute_type(dtype))
    jax.block_until_ready(params)
    seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "before": before,
        "peak": peak(),
        "params": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }


def peak() -> int:
    """The largest resident set of this program so far, bytes; `ru_maxrss` would begin at its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


if __name__ == "__main__":
    sys.exit(main())
