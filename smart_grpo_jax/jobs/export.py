"""`--mode=export`: a checkpoint as files that diffusers, peft and other users of JAX load.

Everything is written to a temporary folder, read back from there, compared with the trainer's velocity,
and renamed last: a folder under its own name is a checked one.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import adapters, card, export, folder, safetensors, tables
from smart_grpo_jax.hub.export import Check
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.jobs import assemble
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.models.lora import merge
from smart_grpo_jax.runtime import metrics
from smart_grpo_jax.runtime.checkpoint import Checkpoints, load_params, save_params
from smart_grpo_jax.runtime.files import remove, storage
from smart_grpo_jax.runtime.progress import Heartbeat, say, table

MARK = "export.json"
"""What a folder must hold to be replaced by a new export."""

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of the velocity, over its maximum: rounding of the folded scale; 8 bits of bfloat16."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The weights that are exported, and where they come from."""

    run: Run
    weights: PyTree
    epoch: int
    which: str
    state_hash: str

    @property
    def lora(self) -> PyTree:
        """The adapter; empty where all weights were trained."""
        return self.weights if self.run.config.adapter.kind == "lora" else {}

    @property
    def base(self) -> PyTree:
        """The transformer that the adapter belongs to, or the trained one."""
        return self.run.frozen["params"] if self.lora else self.weights

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.run.config.adapter.alpha / self.run.config.adapter.rank


def job(
    config: Config, workdir: str, *, epoch: int | None, weights: str | None, form: str | None, out: str | None
) -> None:
    """Write and check what `form` names: lora, full, orbax or all."""
    forms = wanted(config, form)
    trained = load(config, workdir, epoch, weights or config.eval.weights)
    target = Path(out) if out else Path(workdir) / "export" / f"epoch-{trained.epoch}"
    refuse_to_replace(target)
    made = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with storage(made):
            made.mkdir(parents=True)
        with Heartbeat("exporting"):
            checks = [check for name in forms for check in FORMS[name](trained, made)]
        describe(trained, Path(workdir), made, checks)
        with storage(target):
            remove(target)
            os.replace(made, target)
    finally:
        remove(made)
    cells = [
        [c.name, f"{c.tensors}/{c.tensors}", f"{c.difference:.1e}", f"{c.from_base:.1e}"] for c in checks
    ]
    say(table(cells, ["written", "tensors", "velocity off by", "away from the base"]))
    if all(check.from_base == 0 for check in checks):
        say("WARNING: these weights are still the base's: nothing has been learned yet")
    say(f"export in {target}; README.md says how to load it")


def wanted(config: Config, form: str | None) -> list[str]:
    """The forms to write; an adapter that does not exist cannot be."""
    own = "lora" if config.adapter.kind == "lora" else "full"
    form = form or own
    if form not in (*FORMS, "all"):
        raise UserError(f'--format: got "{form}" ({nearest(form, [*FORMS, "all"])})')
    if form == "lora" and own == "full":
        raise UserError("--format: got lora, wanted full or orbax with adapter.kind = full")
    return [name for name in FORMS if form in (name, "all") and not (name == "lora" and own == "full")]


def load(config: Config, workdir: str, epoch: int | None, which: str) -> Trained:
    """The newest checkpoint, or that of an epoch."""
    if which not in ("ema", "raw"):
        raise UserError(f'--weights: got "{which}", wanted ema or raw')
    run = assemble.assemble(config, training=False)
    with Checkpoints(workdir, keep=1, best_of=None, say=say, read_only=True) as checkpoints:
        restored = checkpoints.restore(run.state(), epoch=epoch)
    if restored is None:
        raise UserError(f"{workdir}: no checkpoint to export; train first, or name the run with --workdir")
    weights = restored.state.ema if which == "ema" else restored.state.params
    return Trained(run, weights, restored.epoch, which, restored.state_hash)


def refuse_to_replace(target: Path) -> None:
    """Only an earlier export gives way to a new one."""
    if target.exists() and not (target / MARK).is_file():
        raise UserError(f"--out: {target} exists and is no export, wanted a new folder")


def as_lora(trained: Trained, out: Path) -> list[Check]:
    """diffusers' file and peft's folder."""
    adapter, pipe = trained.run.config.adapter, trained.run.pipeline
    place = (pipe.weights_table, pipe.transformer)
    export.write_lora(out, *place, trained.lora, adapter.rank, trained.scale)
    base = trained.run.config.model.path
    export.write_peft(out / "peft", *place, trained.lora, adapter.rank, adapter.alpha, base)
    checks = []
    for name, file in (("lora", out / adapters.FILE), ("peft", out / "peft" / adapters.PEFT_FILE)):
        tree = adapters.read(file, *place)
        read = pipe.velocity_fn(adapter.rank, float(adapter.rank), adapter.targets)
        found = velocity(trained, read, {"params": trained.base, "lora": tree})
        count = len(safetensors.Tensors(file).keys())
        checks.append(verdict(trained, name, found, count))
    return checks


def as_full(trained: Trained, out: Path) -> list[Check]:
    """The transformer's folder, adapters merged."""
    run, pipe = trained.run, trained.run.pipeline
    published = read_json(pipeline_folder(run.config.model.path) / "transformer", "config.json")
    leaf = export.merged(trained.base, trained.lora, trained.scale, pipe.dtype)
    place = (pipe.weights_table, pipe.transformer)
    export.write_transformer(out / "transformer", *place, published, leaf, pipe.dtype)
    config = folder.read_config(out, "transformer", pipe.weights_table.name)
    again = folder.read_params(out, "transformer", pipe.weights_table.name, config, None)
    found = velocity(trained, pipe.velocity_fn(), {"params": again, "lora": {}})
    count = sum(len(place.keys) for place in tables.places(*place))
    return [verdict(trained, "full", found, count)]


def as_orbax(trained: Trained, out: Path) -> list[Check]:
    """Trees for other users of JAX: what was trained, and the whole transformer."""
    whole = merge(trained.base, trained.lora, trained.scale) if trained.lora else trained.weights
    save_params(out / "orbax" / "trained", trained.weights)
    save_params(out / "orbax" / "merged", whole)
    again = load_params(out / "orbax" / "merged", whole)
    found = velocity(trained, trained.run.pipeline.velocity_fn(), {"params": again, "lora": {}})
    return [verdict(trained, "orbax", found, len(jax.tree.leaves(again)))]


FORMS: Mapping[str, Callable[[Trained, Path], list[Check]]] = {
    "lora": as_lora,
    "full": as_full,
    "orbax": as_orbax,
}


def velocity(trained: Trained, network: Any, params: PyTree) -> jax.Array:
    """The network's velocity on fixed noise, two times and two prompts."""
    run = trained.run
    texts = [run.config.prompts.negative, run.eval_items[0].text]
    x = jax.random.normal(jax.random.key(0), (2, *run.shape.latent))
    t = jnp.array([0.9, 0.4], jnp.float32)
    scale = jnp.float32(run.config.sampler.guidance) if run.pipeline.transformer.embeds_guidance else None
    return jax.jit(network)(params, x, t, run.embeddings.rows(texts), scale)


def verdict(trained: Trained, name: str, found: jax.Array, count: int) -> Check:
    """The comparison with the trainer's own function and with the base."""
    run = trained.run
    own = velocity(trained, run.velocity, run.policy.bind(run.frozen, trained.weights))
    base = velocity(trained, run.velocity, run.policy.reference(run.frozen))
    return export.compare(name, found, own, base, count, TOLERANCE[run.config.model.dtype])


def describe(trained: Trained, workdir: Path, out: Path, checks: list[Check]) -> None:
    """The model card and its facts as JSON."""
    run, config = trained.run, trained.run.config
    facts = facts_of(trained, workdir)
    search = "Smart-GRPO" if searched_steps(config) else "Flow-GRPO"
    settings = {
        "title": f"{Path(config.model.path).name}, {search}, epoch {trained.epoch}",
        "method": search,
        "base": config.model.path,
        "pipeline": run.pipeline.family.name,
        "transformer": run.pipeline.weights_table.name,
        "prompt": run.eval_items[0].text,
        "steps": config.sampler.eval_steps,
        "guidance": config.sampler.eval_guidance,
    }
    files = card.digests(out)
    folder.write_text(out / "README.md", card.card(facts, settings, checks, files))
    rows = [check._asdict() for check in checks]
    folder.write_text(out / MARK, json.dumps({**facts, "checks": rows, "files": files}, indent=2) + "\n")


def facts_of(trained: Trained, workdir: Path) -> dict[str, Any]:
    """What the card's table tells of the run."""
    config = trained.run.config
    adapter = config.adapter
    kind = f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}" if adapter.kind == "lora" else "all weights"
    facts = {
        "epoch": trained.epoch,
        "weights": {"ema": "averaged weights", "raw": "raw weights"}[trained.which],
        "trained": kind,
        "rewards": ", ".join(f"{k} {schema.weight_of(v):g}" for k, v in config.rewards.items()),
        "prompts": f"{config.prompts.source}, {config.prompts.groups} × {config.prompts.members} an epoch",
        "loss": f"{config.train.loss}, learning rate {config.train.learning_rate:g}",
        "sampler": f"{config.sampler.transition}, {config.sampler.steps} steps, guidance "
        f"{config.sampler.guidance:g}, noise {config.sampler.noise_level:g}",
        "search": f"{config.search.rounds} rounds of {config.search.candidates}"
        if searched_steps(config)
        else "none",
        "seed": config.seed,
        "state_hash": trained.state_hash,
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "flax", "numpy")),
    }
    return facts | evaluated(workdir, trained.epoch)


def evaluated(workdir: Path, epoch: int) -> dict[str, float]:
    """The evaluation of this epoch and of the base, where the run has them."""
    try:
        lines = {row["epoch"]: row for row in metrics.read(workdir)}
    except (OSError, UserError):
        return {}
    found = {}
    for label, row in (("base", lines.get(0, {})), ("trained", lines.get(epoch, {}))):
        scores = {k: v for k, v in row.items() if k.startswith("eval/") and np.isfinite(v)}
        found |= {f"{name}, {label}": round(float(value), 4) for name, value in scores.items()}
    return found
