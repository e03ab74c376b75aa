"""What is exported, and what its model card says of it, from the run's own records."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.hub import card, folder, tables
from smart_grpo_jax.hub.export import Check
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.runtime import metrics
from smart_grpo_jax.runtime.files import fsync_folder

MARK = "export.json"
"""The facts of an export as JSON: also what a folder must hold to be replaced by a new export."""

METHODS = {"ppo": "Flow-GRPO", "guard": "GRPO-Guard", "nft": "DiffusionNFT", "awm": "AWM"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "safetensors", "numpy")


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
        """The transformer that the adapter belongs to, or the trained one with what is never learned."""
        return self.run.policy.bind(self.run.frozen, self.weights)["params"]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.run.config.adapter.alpha / self.run.config.adapter.rank

    @property
    def place(self) -> tuple[tables.Table, Any]:
        """The transformer's weight table and its config."""
        return self.run.pipeline.weights_table, self.run.pipeline.transformer

    def has_learned(self) -> bool:
        """Whether any weight differs from the base's."""
        if self.lora:
            leaves = flatten_dict(self.lora, sep="/")
            return any(bool(jnp.any(leaf != 0)) for name, leaf in leaves.items() if name.endswith("/b"))
        differs = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), self.base, self.run.frozen["params"])
        return any(jax.tree.leaves(differs))


def run_config(workdir: Path, given: Config) -> Config:
    """The config that the run was trained with; the given one where the folder has none that is readable."""
    try:
        return configs.from_dict(json.loads((workdir / "config.json").read_text()))
    except (OSError, ValueError, UserError):
        return given


def describe(
    trained: Trained, stored: Config, workdir: Path, out: Path, checks: list[Check], remarks: list[str]
) -> None:
    """The model card and its facts as JSON."""
    config = trained.run.config
    facts = facts_of(trained, stored)
    scores = evaluated(workdir, trained.epoch) if trained.which == stored.eval.weights else {}
    method = "Smart-GRPO" if searched_steps(stored) else METHODS[stored.train.loss]
    settings = {
        "title": f"{Path(config.model.path).name}, {method}, epoch {trained.epoch}",
        "method": method,
        "base": config.model.path,
        "pipeline": trained.run.pipeline.family.name,
        "transformer": trained.run.pipeline.weights_table.name,
        "absent": absent(trained),
        "call": call(trained),
    }
    files = card.digests(out)
    folder.write_text(out / "README.md", card.card(facts, settings, checks, files, scores, remarks))
    told = {
        **facts,
        "evaluation": scores,
        "checks": [check._asdict() for check in checks],
        "remarks": remarks,
        "files": files,
    }
    folder.write_json(out / MARK, told)
    fsync_folder(out)


def absent(trained: Trained) -> list[str]:
    """Components that diffusers must be told to do without."""
    family = trained.run.pipeline.family
    present = folder.components(pipeline_folder(trained.run.config.model.path))
    lacking = [name for name in family.optional if name not in present]
    return [*lacking, *(family.tokenizers[name] for name in lacking)]


def call(trained: Trained) -> dict[str, Any]:
    """The arguments of a diffusers call that samples as the run was evaluated."""
    run, config = trained.run, trained.run.config
    height, width, _ = run.shape.latent
    arguments = {
        "prompt": run.eval_items[0].text,
        "num_inference_steps": config.sampler.eval_steps,
        "guidance_scale": config.sampler.eval_guidance,
        "height": height * run.pipeline.vae.factor,
        "width": width * run.pipeline.vae.factor,
        "max_sequence_length": config.model.t5_length,
    }
    if config.prompts.negative and run.pipeline.family.doubles:
        arguments["negative_prompt"] = config.prompts.negative
    return arguments


def facts_of(trained: Trained, stored: Config) -> dict[str, Any]:
    """What the card's table tells of the run."""
    adapter, s, search = stored.adapter, stored.sampler, stored.search
    kind = f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}" if adapter.kind == "lora" else "all weights"
    facts = {
        "epoch": trained.epoch,
        "weights": {"ema": "averaged weights", "raw": "raw weights"}[trained.which],
        "trained": kind,
        "model": f"{stored.model.path}, {stored.model.dtype}",
        "rewards": ", ".join(f"{k} {schema.weight_of(v):g}" for k, v in stored.rewards.items()),
        "prompts": f"{stored.prompts.source}, {stored.prompts.groups} × {stored.prompts.members} an epoch",
        "loss": f"{stored.train.loss}, learning rate {stored.train.learning_rate:g}",
        "sampler": f"{s.transition}, {s.steps} steps, guidance {s.guidance:g}, noise {s.noise_level:g}",
        "search": f"{search.rounds} rounds of {search.candidates}" if searched_steps(stored) else "none",
        "seed": stored.seed,
        "state_hash": trained.state_hash,
        "versions": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES),
    }
    return facts | ({"started from": adapter.init} if adapter.init else {})


def evaluated(workdir: Path, epoch: int) -> dict[str, dict[str, float]]:
    """The evaluations of the base and of this epoch, where the run has them: {score: {base, trained}}."""
    try:
        lines = {row["epoch"]: row for row in metrics.read(workdir)}
    except (OSError, UserError):
        return {}
    found: dict[str, dict[str, float]] = {}
    for label, row in (("base", lines.get(0, {})), ("trained", lines.get(epoch, {}))):
        for name, value in row.items():
            if name.startswith("eval/") and np.isfinite(value):
                found.setdefault(name.removeprefix("eval/"), {})[label] = float(value)
    return {name: row for name, row in found.items() if "trained" in row}
