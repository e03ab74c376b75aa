"""What one call of each kind costs on this machine: `python benchmarks/call_costs.py CONFIG --out=FILE`.

A comparison at equal cost weighs the counted calls (`nfe/*`) by these seconds: one image through the
network, through its backward pass (the gradient less its forward), the decoder, the reward. The batch is
one rollout call of the config. Each time is the least of several repeats: other work on the machine only
adds. `--mode=compare` and `--mode=experiment` read `costs.json` beside or above the run folders.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.jobs import assemble
from smart_grpo_jax.main import run_file
from smart_grpo_jax.runtime import compile_cache
from smart_grpo_jax.runtime.files import write_json
from smart_grpo_jax.runtime.mesh import local_devices_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one config, print a line of JSON, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", help="a config file, with its words")
    parser.add_argument("--out", default="", help="the file to write, e.g. runs/experiments/costs.json")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(argv)
    compile_cache.enable()
    found = measure(configs.from_dict(run_file(arguments.config)), arguments.repeats)
    found["config"] = arguments.config
    print(json.dumps(found))
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, found)
    return 0


def measure(config: Config, repeats: int) -> dict[str, Any]:
    """Seconds per image of each kind of call."""
    run = assemble.assemble(config, training=False)
    groups = config.memory.rollout or config.prompts.groups
    texts = [item.text for item in run.eval_items[:groups] for _ in range(config.prompts.members)]
    batch, _ = assemble.make_batch(run, texts, len(texts), run.reward, range(len(texts)))
    trainable = run.state().params
    params = run.rollout_params(trainable)
    x = jax.random.normal(jax.random.key(0), (len(texts), *run.shape.latent))
    t = jnp.full(len(texts), 0.5)
    velocity = lambda params, x: run.fns.velocity(params["policy"], x, t, batch.cond)
    decode = lambda params, x: run.fns.decode(params["decoder"], x)
    images = jax.jit(decode)(params, x)
    score = lambda params, images: run.fns.score(params["reward"], images, batch.ctx, t).value

    def loss(trainable: Any, x: Any) -> Any:
        return jnp.mean(run.policy.velocity(run.policy.bind(run.frozen, trainable), x, t, batch.cond) ** 2)

    forward = least(velocity, repeats, params, x)
    both = least(jax.grad(loss), repeats, trainable, x)
    calls = run.pipeline.calls(config.sampler.guidance)
    count = len(texts)
    return {
        "velocity": forward / count / calls,
        "backward": max(both - forward, 0.0) / count / calls,
        "decode": least(decode, repeats, params, x) / count,
        "reward": least(score, repeats, params, images) / count,
        "images": count,
        "machine": f"{local_devices_summary()}, {os.cpu_count()} CPU cores",
    }


def least(fn: Callable[..., Any], repeats: int, *arguments: Any) -> float:
    """The shortest of several calls of the compiled function, in seconds."""
    program = jax.jit(fn)
    jax.block_until_ready(program(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
