"""`--mode=rewards --bench`: what each reward of a config costs, at the size and batch of its rollouts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.hub import folder
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.maths import flops
from smart_grpo_jax.rewards import base, mixture
from smart_grpo_jax.runtime.progress import Heartbeat, say, table
from smart_grpo_jax.runtime.topologies import chip_of

SECONDS = 1.0
"""How long a reward is timed, after one call that is not."""


class Cost(NamedTuple):
    """One reward on one batch; None where there is no such number (a reward outside the graph)."""

    name: str
    rate: float
    flops: float | None
    compile_seconds: float | None
    parameters: int | None
    temporary: int | None


def job(config: Config) -> None:
    """The table of all rewards that training, search and evaluation name."""
    pixels, batch = image_size(config), batch_of(config)
    texts = prompt_data.load(config.prompts.source).prompts
    prompts = [texts[i % len(texts)] for i in range(batch)]
    device = jax.devices()[0]
    rows = []
    for name, entry in entries(config).items():
        with Heartbeat(f"measuring {name}"):
            reward = base.build(name, limits=config.host, **mixture.options_of(entry))
            rows.append(measure(name, reward, pixels, prompts))
    say(f"{batch} images of {pixels[0]}x{pixels[1]} in a call, on {device.device_kind} ({device.platform})")
    chip = chip_of(device.device_kind)
    say(text(rows, batch, chip.flops if chip else None))


def entries(config: Config) -> dict[str, Any]:
    """Every reward that the config names; one that two tables spell differently is measured for each."""
    found: dict[str, Any] = {}
    for table_of in (config.rewards, config.search_reward, config.eval_rewards):
        for name, entry in table_of.items():
            found.setdefault(name, entry)
    return found


def image_size(config: Config) -> tuple[int, int]:
    """Height and width of the pipeline's pictures, read from its configs alone."""
    root = pipeline_folder(config.model.path)
    classes = folder.components(root)
    network, vae = (folder.read_config(root, name, classes[name]) for name in ("transformer", "vae"))
    side = config.model.resolution or network.default_side * vae.factor
    return side, side


def batch_of(config: Config) -> int:
    """Images in one call of the reward during a rollout."""
    groups = config.memory.rollout or config.prompts.groups
    images = groups * config.prompts.members
    return min(config.memory.reward, images) or images


def measure(name: str, reward: base.Reward, pixels: tuple[int, int], prompts: Sequence[str]) -> Cost:
    """Compile and time one reward on noise; prompts are prepared beforehand, as in training."""
    shape = (len(prompts), *pixels, 3)
    images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    if reward.host is not None:
        return Cost(name, outside(reward, images, prompts), None, None, None, None)
    context = reward.prepare(prompts)
    arguments = jax.device_put((reward.params, images, context))
    operations = flops.count(lambda p, a, c: reward.score(p, a, c, None).value, *arguments)
    started = time.monotonic()
    program = jax.jit(reward.score).lower(*arguments).compile()
    compile_seconds = time.monotonic() - started
    memory = program.memory_analysis()
    jax.block_until_ready(program(*arguments))
    calls, started = 0, time.monotonic()
    while calls == 0 or time.monotonic() - started < SECONDS:
        jax.block_until_ready(program(*arguments))
        calls += 1
    rate = calls * len(prompts) / (time.monotonic() - started)
    weights = sum(int(a.size) for a in jax.tree.leaves(reward.params))
    temporary = int(memory.temp_size_in_bytes) if memory is not None else None
    return Cost(name, rate, operations / len(prompts), compile_seconds, weights, temporary)


def outside(reward: base.Reward, images: Float[np.ndarray, "b H W 3"], prompts: Sequence[str]) -> float:
    """Images per second of a reward that is plain Python or a server; NaN where a score did not come."""
    assert reward.host is not None
    started = time.monotonic()
    scores = reward.host(base.eight_bit(images), prompts, [f"bench/{i}" for i in range(len(prompts))])
    seconds = time.monotonic() - started
    return len(prompts) / seconds if np.isfinite(scores.value).all() else float("nan")


def text(rows: Sequence[Cost], batch: int, peak: float | None) -> str:
    """The table; utilisation is operations per second over the device's peak."""
    cells = [
        [
            row.name,
            f"{row.rate:,.0f}" if np.isfinite(row.rate) else "failed",
            "outside the graph" if row.flops is None else f"{row.flops / 1e9:.4g}",
            utilisation(row, peak),
            _or_dash(row.compile_seconds, "{:.1f} s"),
            _or_dash(row.parameters, "{:,}"),
            _or_dash(None if row.temporary is None else row.temporary / 2**20, "{:,.1f} MiB"),
        ]
        for row in rows
    ]
    header = [
        "reward", "images/s", "GFLOP/image", "utilisation", "compile or fetch", "parameters",
        f"memory for {batch} images",
    ]  # fmt: skip
    return table(cells, header)


def utilisation(row: Cost, peak: float | None) -> str:
    """Model FLOPs utilisation in words."""
    if row.flops is None:
        return "–"
    return "peak unknown" if peak is None else f"{row.flops * row.rate / peak:.1%}"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
