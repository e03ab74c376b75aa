"""Pictures from the command line: `--mode=sample --prompts="a photo of a red circle|a photo of two crosses"`.

Equal seeds give equal pictures whatever else is asked for in the same call: every call of the program has
the same shape, and a picture's noise follows from its prompt and its seed alone. With eval.search the
noise is searched while sampling, and the sheet shows plain and searched pictures one above the other.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, PngImagePlugin

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, negative_of
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import assemble, evaluate, measured_window, record
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.jobs.statistics import HEADLINE
from smart_grpo_jax.rewards import base, mixture
from smart_grpo_jax.runtime.checkpoint import Checkpoints
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.progress import Heartbeat, say, table


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None: as the config says."""

    prompts: str | None = None
    seed: int = 0
    seeds: int = 1
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    lora: str | None = None
    batch: int = 8
    epoch: int | None = None
    out: str | None = None


def pixels(text: str | None) -> tuple[int, int] | None:
    """`512` or `512x768` (height × width) as a pair."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise UserError(f'--size: got "{text}", wanted a side such as 512, or HEIGHTxWIDTH')
    height = int(match[1])
    return height, int(match[2] or height)


def texts(given: str | None, config: Config) -> list[str]:
    """Prompts of the command line (`a|b`, or a file); without them, the first held-out prompts."""
    if given is None:
        items = prompt_data.evaluation_items(prompt_data.load(config.eval.source), config.log.samples)
        return [item.text for item in items]
    if os.path.isfile(given):
        return list(prompt_data.load(given).prompts)
    found = [text.strip() for text in given.split("|") if text.strip()]
    if not found:
        raise UserError(f'--prompts: got "{given}", wanted prompts separated by | or a file')
    return found


def job(config: Config, workdir: str, wanted: Wanted) -> None:
    """Write one PNG per prompt and seed, with its parameters inside, and a contact sheet."""
    prompts = texts(wanted.prompts, config)
    config = as_asked(config, wanted, len(prompts))
    items = [prompt_data.Item(text, prompts[:i].count(text)) for i, text in enumerate(prompts)]
    config, absent = reachable(measured_window.asked(config, workdir))
    run = judged(assemble.assemble(config, items, lora=wanted.lora, training=False), prompts, wanted)
    run = dataclasses.replace(run, eval_reward=base.nothing()) if absent else run
    weights, source = loaded(run, workdir, wanted)
    rows = {}
    for noise, search in (("plain", False), ("searched", True))[: 1 + config.eval.search]:
        draw = evaluate.evaluator(run, search=search, size=wanted.size, batch=wanted.batch)
        with Heartbeat(f"sampling with {noise} noise"):
            rows[noise] = [draw(weights, wanted.seed + i) for i in range(wanted.seeds)]
    folder = Path(wanted.out or Path(workdir) / "sampled")
    folder.mkdir(parents=True, exist_ok=True)
    for noise, results in rows.items():
        for seed, result in enumerate(results, wanted.seed):
            for i, (text, image) in enumerate(zip(prompts, result.images, strict=True)):
                name = f"{i:03d}_{noise}" + (f"_seed{seed}" if wanted.seeds > 1 else "")
                facts = {"prompt": text, "weights": source, "noise": noise, "seed": seed}
                facts["negative"] = negative_of(text, config.prompts.negative)
                write_atomic(folder / f"{name}.png", with_text(image, facts, config))
    pictures = np.concatenate([result.images for results in rows.values() for result in results])
    lines = len(pictures) // len(prompts)
    sheet = record.grid(pictures, columns=min(8, len(prompts)) if lines == 1 else len(prompts))
    write_atomic(folder / "sheet.png", record.png(sheet))
    if run.eval_reward.name != base.nothing().name:
        report_scores(rows, source)
    say(f"{len(pictures)} pictures and sheet.png in {folder}")


def as_asked(config: Config, wanted: Wanted, count: int) -> Config:
    """The config with the command line's steps, guidance and batch."""
    if min(wanted.seeds, wanted.batch, 1 if wanted.steps is None else wanted.steps) < 1:
        raise UserError("sample: --seeds, --batch and --steps must be at least 1")
    sampler = dataclasses.replace(
        config.sampler,
        eval_steps=config.sampler.eval_steps if wanted.steps is None else wanted.steps,
        eval_guidance=config.sampler.eval_guidance if wanted.guidance is None else wanted.guidance,
    )
    return dataclasses.replace(
        config,
        sampler=sampler,
        log=dataclasses.replace(config.log, samples=count),
        eval=dataclasses.replace(config.eval, seeds=1),
    )


def reachable(config: Config) -> tuple[Config, bool]:
    """The config, without the rewards of servers that are not there, and whether that is so."""
    try:
        for table in (config.rewards, config.eval_rewards):
            mixture.greet(table, config.host)
    except UserError as error:
        say(f"pictures are not scored: {error.line}")
        return dataclasses.replace(config, rewards={"compressibility": 1.0}, eval_rewards={}), True
    return config, False


def judged(run: Run, prompts: list[str], wanted: Wanted) -> Run:
    """The run, without a judge where the rewards cannot judge these prompts or pictures of this size: a
    picture is wanted, not a score. The search needs its reward and says so itself."""
    height, width, _ = run.pipeline.latent_shape(wanted.size) if wanted.size else run.shape.latent
    factor = run.pipeline.vae.factor
    images = jax.ShapeDtypeStruct((len(prompts), height * factor, width * factor, 3), jnp.float32)
    try:
        jax.eval_shape(
            run.eval_reward.score, run.eval_reward.params, images, run.eval_reward.prepare(prompts)
        )
    except UserError as error:
        say(f"pictures are not scored: {error.line}")
        blind = base.nothing()
        search = run.search_reward if run.config.eval.search else blind
        return dataclasses.replace(run, eval_reward=blind, search_reward=search)
    return run


def loaded(run: Run, workdir: str, wanted: Wanted) -> tuple[PyTree, str]:
    """The weights to sample with, and what to call them: a checkpoint, a LoRA file, or the base."""
    state = run.state()
    if wanted.lora is not None:
        return state.params, f"base with {wanted.lora}"
    with Checkpoints(workdir, keep=1, best_of=None, say=say, read_only=True) as checkpoints:
        restored = checkpoints.restore(state, epoch=wanted.epoch)
    if restored is None:
        return evaluate.evaluated_weights(run.config, state), "base"
    return evaluate.evaluated_weights(run.config, restored.state), f"epoch {restored.epoch}"


def with_text(image: np.ndarray, facts: dict[str, object], config: Config) -> bytes:
    """PNG bytes with the parameters of the picture in its metadata."""
    info = PngImagePlugin.PngInfo()
    parameters = {
        **facts,
        "model": config.model.path,
        "steps": config.sampler.eval_steps,
        "guidance": config.sampler.eval_guidance,
        "size": f"{image.shape[0]}x{image.shape[1]}",
        "dtype": config.model.dtype,
    }
    for key, value in parameters.items():
        info.add_text(key, str(value))
    return record.png(Image.fromarray(record.to_bytes(image)), info)


def report_scores(rows: dict[str, list[evaluate.Evaluation]], source: str) -> None:
    """Mean scores of the pictures, where a reward can judge them."""
    first = {noise: results[0] for noise, results in rows.items()}
    names = [n for n in HEADLINE if any(n in r.scores for r in first.values())]
    if not names:
        return
    cells = [
        [source, noise, *(f"{np.mean([r.means()[n] for r in rows[noise]]):.3f}" for n in names)]
        for noise in first
    ]
    say(table(cells, ["weights", "noise", *(HEADLINE[n] for n in names)]))
