"""`--mode=export`: a checkpoint as files that diffusers, peft and other users of JAX load.

Everything is written to a temporary folder, read back from there, compared with what was meant and with
the trainer's velocity, and renamed last: a folder under its own name is a checked one.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.hub import adapters, export, folder, functions, safetensors, tables
from smart_grpo_jax.hub.export import Check
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.hub.tokenizers import read_json
from smart_grpo_jax.jobs import assemble, export_facts
from smart_grpo_jax.jobs.export_facts import Trained
from smart_grpo_jax.models.lora import merge
from smart_grpo_jax.runtime.checkpoint import Checkpoints, load_params, save_params
from smart_grpo_jax.runtime.files import remove, storage
from smart_grpo_jax.runtime.progress import Heartbeat, say, table
from smart_grpo_jax.runtime.run_folder import check_same

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference of the velocity, over its maximum: rounding of the folded scale; 8 bits of bfloat16."""


def job(
    config: Config, workdir: str, *, epoch: int | None, weights: str | None, form: str | None, out: str | None
) -> None:
    """Write and check what `form` names: lora, full, orbax or all."""
    forms = wanted(config, form)
    stored = export_facts.run_config(Path(workdir), config)
    check_same(meaning(stored), meaning(config), "adapter")
    if out:
        refuse_to_replace(Path(out).resolve())
    trained = load(config, workdir, epoch, weights or config.eval.weights)
    target = Path(out or Path(workdir) / "export" / f"epoch-{trained.epoch}").resolve()
    refuse_to_replace(target)
    made = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with storage(made):
            made.mkdir(parents=True)
        with Heartbeat("exporting"):
            checks = [check for name in forms for check in FORMS[name](trained, made)]
        remarks = doubts(trained, checks)
        with storage(made):
            export_facts.describe(trained, stored, Path(workdir), made, checks, remarks)
        with storage(target):
            remove(target)
            os.replace(made, target)
    finally:
        remove(made)
    report(checks, remarks, target)


def wanted(config: Config, form: str | None) -> list[str]:
    """The forms to write; an adapter that does not exist cannot be."""
    own = "lora" if config.adapter.kind == "lora" else "full"
    form = form or own
    if form == "lora" and own == "full":
        raise UserError("--format: got lora, wanted full or orbax with adapter.kind = full")
    return [name for name in FORMS if form in (name, "all") and not (name == "lora" and own == "full")]


def meaning(config: Config) -> dict[str, Any]:
    """What says how the arrays of a checkpoint are to be read."""
    adapter = config.adapter
    return {"kind": adapter.kind, "rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets}


def refuse_to_replace(target: Path) -> None:
    """Only an earlier export gives way to a new one."""
    if target.exists() and not (target / export_facts.MARK).is_file():
        raise UserError(f"--out: {target} exists and is no export, wanted a new folder")


def load(config: Config, workdir: str, epoch: int | None, which: str) -> Trained:
    """The newest checkpoint, or that of an epoch; looked for before the model is loaded."""
    if jax.process_count() > 1:
        raise UserError(
            f"--mode=export: got {jax.process_count()} processes, wanted one (on a host of its own: "
            "JAX_PLATFORMS=cpu)"
        )
    with Checkpoints(workdir, keep=1, best_of=None, say=say, read_only=True) as checkpoints:
        have = checkpoints.list_epochs()
        if not have:
            raise UserError(
                f"{workdir}: no checkpoint to export; train first, or name the run with --workdir"
            )
        if epoch is not None and epoch not in have:
            raise UserError(f"--epoch: got {epoch}, wanted one of {', '.join(map(str, have[-5:]))}")
        items = prompt_data.evaluation_items(prompt_data.load(config.eval.source), 2)
        run = assemble.assemble(quiet(config), items, training=False)
        restored = checkpoints.restore(run.state(), epoch=epoch)
    if restored is None:
        raise UserError(f"{workdir}: no checkpoint to export")
    weights = restored.state.ema if which == "ema" else restored.state.params
    return Trained(run, weights, restored.epoch, which, restored.state_hash)


def quiet(config: Config) -> Config:
    """The config without what an export has no use for: rewards with their weights, the search, the
    adapter's start. Networks that are compared attend alike."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention="xla"),
        adapter=dataclasses.replace(config.adapter, init=""),
        search=dataclasses.replace(config.search, steps="none"),
        rewards={"compressibility": 1.0},
        search_reward={},
        eval_rewards={},
    )


def as_lora(trained: Trained, out: Path) -> list[Check]:
    """diffusers' file and peft's folder."""
    adapter, pipe, scale = trained.run.config.adapter, trained.run.pipeline, trained.scale
    export.write_lora(out, *trained.place, trained.lora, adapter.rank, scale)
    base = trained.run.config.model.path
    export.write_peft(out / "peft", *trained.place, trained.lora, adapter.rank, adapter.alpha, base)
    read = pipe.velocity_fn(adapter.rank, float(adapter.rank), adapter.targets)
    checks = []
    for name, file, prefix, factor in (
        ("lora", out / adapters.FILE, adapters.PREFIX, scale),
        ("peft", out / "peft" / adapters.PEFT_FILE, adapters.PEFT_PREFIX, 1.0),
    ):
        meant = adapters.to_tensors(*trained.place, trained.lora, factor, prefix)
        with export.reading_back(name):
            reader, tree = safetensors.Tensors(file), adapters.read(file, *trained.place)
            count = export.same_keys(name, reader, meant)
            checks.append(verdict(trained, name, read, {"params": trained.base, "lora": tree}, count))
            export.same_tensors(name, reader, meant.items())
            export.same_trees(name, tree, folded(trained.lora, scale))
    return checks


def folded(lora: PyTree, scale: float) -> PyTree:
    """The adapter with its scale in b: what a file of it must mean to a reader."""
    fold = lambda path, leaf: scale * np.asarray(leaf) if path[-1].key == "b" else leaf
    return jax.tree_util.tree_map_with_path(fold, lora)


def as_full(trained: Trained, out: Path) -> list[Check]:
    """The transformer's folder, adapters merged."""
    run, pipe, name = trained.run, trained.run.pipeline, trained.run.pipeline.weights_table.name
    published = read_json(pipeline_folder(run.config.model.path) / "transformer", "config.json")
    leaf = export.merged(trained.base, trained.lora, trained.scale, pipe.dtype)
    export.write_transformer(out / "transformer", *trained.place, published, leaf, pipe.dtype)
    with export.reading_back("full"):
        config = folder.read_config(out, "transformer", name)
        if config != pipe.transformer:
            raise StorageError(f"export full: {out / 'transformer' / 'config.json'} is another model's")
        reader = folder.open_weights(out, "transformer", name)
        count = export.same_keys("full", reader, [key for key, *_ in tables.lazily(*trained.place, leaf)])
        again = folder.read_params(out, "transformer", name, config, None)
        check = verdict(trained, "full", pipe.velocity_fn(), {"params": again, "lora": {}}, count)
        meant = ((key, make()) for key, _, make in tables.lazily(*trained.place, leaf))
        export.same_tensors("full", reader, meant)
    return [check]


def as_orbax(trained: Trained, out: Path) -> list[Check]:
    """Trees for other users of JAX: the whole transformer, and the adapter where there is one."""
    trees = {"merged": merge(trained.base, trained.lora, trained.scale)}
    trees |= {"trained": trained.lora} if trained.lora else {}
    for name, tree in trees.items():
        save_params(out / "orbax" / name, tree)
    read = {name: load_params(out / "orbax" / name, tree) for name, tree in trees.items()}
    params = {"params": read["merged"], "lora": {}}
    count = len(jax.tree.leaves(trees))
    check = verdict(trained, "orbax", trained.run.pipeline.velocity_fn(), params, count)
    export.same_trees("orbax", read, trees)
    return [check]


FORMS: Mapping[str, Callable[[Trained, Path], list[Check]]] = {
    "lora": as_lora,
    "full": as_full,
    "orbax": as_orbax,
}


def velocity(trained: Trained, network: Any, params: PyTree) -> jax.Array:
    """The network's velocity on fixed noise, two times and two prompts."""
    run = trained.run
    texts = [run.eval_items[0].text, run.eval_items[-1].text]
    x = jax.random.normal(jax.random.key(0), (2, *run.shape.latent))
    t = jnp.array([0.9, 0.4], jnp.float32)
    scale = jnp.float32(run.config.sampler.guidance) if run.pipeline.transformer.embeds_guidance else None
    with jax.default_matmul_precision("highest"):  # TOLERANCE is float32's, whatever the device prefers
        return functions.compiled(network)(params, x, t, run.embeddings.rows(texts), scale)


def verdict(trained: Trained, name: str, network: Any, params: PyTree, count: int) -> Check:
    """What was read back beside the trainer's own function and the base."""
    run = trained.run
    found = velocity(trained, network, params)
    own = velocity(trained, run.velocity, run.policy.bind(run.frozen, trained.weights))
    base = velocity(trained, run.velocity, run.policy.reference(run.frozen))
    return export.compare(name, found, own, base, count, TOLERANCE[run.config.model.dtype])


def doubts(trained: Trained, checks: list[Check]) -> list[str]:
    """What a reader of the numbers must know."""
    if not trained.has_learned():
        return ["these weights are still the base's: nothing has been learned yet"]
    dtype = trained.run.config.model.dtype
    return [
        f"{c.name}: the velocity is off by {c.difference:.1e} in {dtype}, where training has moved it by "
        f"{c.learned:.1e} only"
        for c in checks
        if c.difference > c.learned / 2
    ]


def report(checks: list[Check], remarks: list[str], target: Path) -> None:
    """What was written and checked."""
    cells = [
        [c.name, f"{c.tensors}/{c.tensors}", f"{c.difference:.1e}", f"{c.from_base:.1e}"] for c in checks
    ]
    say(table(cells, ["written", "tensors", "velocity off by", "away from the base"]))
    for remark in remarks:
        say(f"WARNING: {remark}")
    say(f"export in {target}; README.md says how to load it")
