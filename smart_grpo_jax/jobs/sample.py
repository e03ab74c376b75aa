"""Pictures from the command line: `--mode=sample --prompts="a photo of a red circle|a photo of two crosses"`.

Equal seeds give equal pictures whatever else is asked for in the same call. With eval.search the noise
is searched while sampling, and the sheet shows plain and searched pictures one above the other.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import assemble, evaluate, record
from smart_grpo_jax.jobs.statistics import HEADLINE
from smart_grpo_jax.runtime.checkpoint import Checkpoints
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.progress import Heartbeat, say, table


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


def job(
    config: Config, workdir: str, prompts: str | None, seed: int, epoch: int | None, out: str | None
) -> None:
    """Write one PNG per prompt, with its parameters inside, and a contact sheet."""
    wanted = texts(prompts, config)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, samples=len(wanted)))
    items = [prompt_data.Item(text, wanted[:i].count(text)) for i, text in enumerate(wanted)]
    run = dataclasses.replace(assemble.assemble(config), eval_items=items)
    state, source = run.state(), "base"
    with Checkpoints(workdir, keep=1, best_of=None, say=say, read_only=True) as checkpoints:
        restored = checkpoints.restore(state, epoch=epoch)
    if restored is not None:
        state, source = restored.state, f"epoch {restored.epoch}"
    weights = evaluate.evaluated_weights(config, state)
    rows = {}
    for search in (False, True) if config.eval.search else (False,):
        with Heartbeat("sampling"):
            rows["searched" if search else "plain"] = evaluate.evaluator(run, search=search, seed=seed)(
                weights
            )
    folder = Path(out or Path(workdir) / "sampled")
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in rows.items():
        for i, (text, image) in enumerate(zip(wanted, result.images, strict=True)):
            write_atomic(folder / f"{i:03d}_{name}.png", with_text(image, text, source, name, seed, config))
    stacked = np.concatenate([result.images for result in rows.values()])
    sheet = record.grid(stacked, columns=min(8, len(wanted)) if len(rows) == 1 else len(wanted))
    write_atomic(folder / "sheet.png", record.png(sheet))
    report_scores(rows, source)
    say(f"{len(stacked)} pictures and sheet.png in {folder}")


def with_text(image: np.ndarray, text: str, source: str, noise: str, seed: int, config: Config) -> bytes:
    """PNG bytes with the parameters of the picture in its metadata."""
    info = PngImagePlugin.PngInfo()
    parameters = {
        "prompt": text,
        "model": config.model.path,
        "weights": source,
        "noise": noise,
        "seed": seed,
        "steps": config.sampler.eval_steps,
        "guidance": config.sampler.eval_guidance,
    }
    for key, value in parameters.items():
        info.add_text(key, str(value))
    return record.png(Image.fromarray(record.to_bytes(image)), info)


def report_scores(rows: dict[str, evaluate.Evaluation], source: str) -> None:
    """Mean scores of the pictures, where a reward can judge them."""
    names = [n for n in HEADLINE if any(n in r.scores for r in rows.values())]
    cells = [[source, noise, *(f"{r.means()[n]:.3f}" for n in names)] for noise, r in rows.items()]
    say(table(cells, ["weights", "noise", *(HEADLINE[n] for n in names)]))
