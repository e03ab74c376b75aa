"""How much of a rollout is the network: `python benchmarks/rollout.py [--model=shapes]`.

A rollout without the search is steps × (network + noise, transition, density). The jitted program is timed
against nothing but the network, jitted alone, with the same weights, batch and guidance, in turns in one
process; both in network forwards per second, medians of several repeats. Decoding and scoring come once
per image, not once per step, and are timed apart. Below 0.8 the program wastes the machine: exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import Scores
from smart_grpo_jax.jobs import assemble, traced
from smart_grpo_jax.policy import cost, rollout
from smart_grpo_jax.runtime import compile_cache
from smart_grpo_jax.runtime.compile_cache import CompileCount
from smart_grpo_jax.runtime.mesh import local_devices_summary

FLOOR = 0.8


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and a line of JSON; 1 where the ratio is below the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="shapes", help="a diffusers folder, or shapes")
    parser.add_argument("--reward", default="shapes", help="reward of the finished images")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args(argv)
    compile_cache.enable()
    found = measure(arguments)
    print(table(found))
    print(json.dumps(found))
    return int(found["ratio"] < FLOOR)


def build(arguments: argparse.Namespace) -> Config:
    """A Flow-GRPO config of the asked size; all weights trained, so that no adapter blurs the picture."""
    values = configs.default()
    values.model.path, values.model.dtype = arguments.model, arguments.dtype
    values.adapter.kind = "full"
    values.prompts.groups, values.prompts.members = arguments.groups, arguments.members
    values.sampler.steps, values.sampler.guidance = arguments.steps, arguments.guidance
    values.search.rounds = 0
    values.rewards = {arguments.reward: 1.0}
    values.train.updates_per_epoch = 1
    return configs.from_dict(values)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The three programs in turns, `repeats` times each after two for warming up."""
    config = build(arguments)
    run = assemble.assemble(config)
    texts = list(run.prompts.prompts[: arguments.groups])
    batch, _ = assemble.make_batch(run, texts, len(texts), run.reward, range(len(texts)))
    params = jax.block_until_ready(run.rollout_params(run.state().params))
    knobs = traced.rollout_knobs(config, run.times, 0)
    images = len(texts) * arguments.members

    shape = dataclasses.replace(run.shape, searched_members=0)
    act = jax.jit(partial(rollout.act, pathless(run.fns), shape))
    whole = jax.jit(partial(rollout.act, run.fns, shape))
    forward = jax.jit(run.fns.velocity)
    x = jax.random.normal(jax.random.key(0), (images, *shape.latent))
    cond = batch.cond.rows(jnp.repeat(jnp.arange(len(texts)), arguments.members))
    times = [jnp.full(images, t) for t in run.times[:-1]]

    programs: dict[str, Callable[[], Any]] = {
        "rollout": lambda: act(params, knobs, batch).x0,
        "network": lambda: [forward(params["policy"], x, t, cond) for t in times],
        "whole": lambda: whole(params, knobs, batch).reward,
    }
    for _ in range(2):
        for program in programs.values():
            jax.block_until_ready(program())
    with CompileCount() as compiled:
        seconds = in_turns(programs, arguments.repeats)
    if compiled.total:
        raise RuntimeError(f"{compiled.total} programs were compiled while the clock ran")
    return report(arguments, seconds, images * arguments.steps * cost.calls(arguments.guidance), images)


def pathless(fns: rollout.Functions) -> rollout.Functions:
    """The same policy with nothing to decode and nothing to score."""
    return dataclasses.replace(
        fns,
        decode=lambda params, x0: x0[..., :3],
        score=lambda params, images, ctx, t: Scores(images[:, 0, 0, 0], jnp.ones(len(images), bool), {}),
    )


def in_turns(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each program; in turns, so that a busy machine is busy for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(
    arguments: argparse.Namespace, seconds: dict[str, float], forwards: int, images: int
) -> dict[str, Any]:
    """The numbers, and what they were measured on."""
    return {
        "ratio": round(seconds["network"] / seconds["rollout"], 4),
        "ratio_with_decode_and_reward": round(seconds["network"] / seconds["whole"], 4),
        "rollout_forwards_per_second": round(forwards / seconds["rollout"], 1),
        "network_forwards_per_second": round(forwards / seconds["network"], 1),
        "images_per_second": round(images / seconds["whole"], 2),
        "recompilations": 0,
        "model": arguments.model,
        "batch": images,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "machine": local_devices_summary(),
        "load": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(found: dict[str, Any]) -> str:
    """The result for a person."""
    return (
        f"{found['model']}, batch {found['batch']} × {found['steps']} steps, guidance {found['guidance']:g}, "
        f"{found['dtype']}; {found['machine']}, load {found['load']}, jax {found['jax']}, {found['date']}\n"
        f"network alone              {found['network_forwards_per_second']:>10,.1f} forwards/s\n"
        f"rollout                    {found['rollout_forwards_per_second']:>10,.1f} forwards/s  "
        f"ratio {found['ratio']:.3f} (wanted ≥ {FLOOR})\n"
        f"with decoder and reward    {found['images_per_second']:>10,.2f} images/s    "
        f"ratio {found['ratio_with_decode_and_reward']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
