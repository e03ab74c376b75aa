"""The list of runs of an experiment: where each lies, how far it is, what it will cost.

A run lies in `runs/<hash of what it computes>/seed<k>` of the work folder, so that a line which two
experiments share is trained once; `<experiment>/<arm>` links to it under the name that it has there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.experiments import Experiment
from smart_grpo_jax.hub import abstract
from smart_grpo_jax.jobs import assemble, compare_runs, compare_settings, traced
from smart_grpo_jax.jobs.compare_runs import Run
from smart_grpo_jax.maths import window
from smart_grpo_jax.policy import cost
from smart_grpo_jax.runtime import metrics

PRICE = "price.json"
AUDITED = "audit.json"
ALL = 240
"""About as many prompts as the evaluation sets of both sizes have."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One run: an arm with a seed."""

    arm: str
    words: str
    seed: int
    folder: Path
    link: Path
    config: Config
    audit: bool

    @property
    def name(self) -> str:
        """How it is spoken of."""
        return f"{self.arm}, seed {self.seed}"

    def finished(self) -> bool:
        """Whether its last evaluation, or its audit, is stored."""
        if self.audit:
            return (self.folder / AUDITED).is_file()
        last = self.config.train.epochs
        logged = any(row["epoch"] == last and "eval/reward" in row for row in metrics.read(self.folder))
        return logged and (self.folder / "eval" / f"{last}.npz").is_file()

    def epochs_done(self) -> int:
        """How many epochs the log holds."""
        return max((row["epoch"] for row in metrics.read(self.folder)), default=0)


def read(path: str) -> Experiment:
    """The EXPERIMENT of a config file."""
    if not os.path.isfile(path):
        raise UserError(f"--config: no file {path}, wanted one with an EXPERIMENT (configs/paper/)")
    try:
        found = runpy.run_path(path).get("EXPERIMENT")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {path} failed: {type(error).__name__}: {error}") from None
    if not isinstance(found, Experiment):
        raise UserError(f"--config: {path} has no EXPERIMENT, wanted a file such as configs/paper/table1.py")
    return found


def lines(
    experiment: Experiment,
    name: str,
    size: str,
    seeds: Sequence[int],
    workdir: Path,
    overrides: Sequence[tuple[str, str]] = (),
    arms: Sequence[str] = (),
) -> list[Line]:
    """All runs, or those of some arms, seed by seed, so that a list that is cut short has compared all.
    What is not trained has one seed."""
    for arm in arms:
        if arm not in experiment.names(size):
            raise UserError(f'--arms: got "{arm}" ({nearest(arm, experiment.names(size))})')
    found: list[Line] = []
    for place, seed in enumerate(seeds):
        for arm in arms or experiment.names(size):
            values: Any = experiment.get_config(f"{arm},{size}")
            for field, text in overrides:
                configs.override(values, field, text)
            values.seed = seed
            if experiment.arms[arm].longer == 0:
                values.train.epochs = 0  # whatever the command line says of the others
            config = configs.from_dict(values)
            if place > 0 and (config.train.epochs == 0 or experiment.audit):
                continue
            made = identity(configs.to_dict(config), experiment.audit)
            folder = workdir / "runs" / made / f"seed{seed}"
            link = workdir / name / arm
            found.append(Line(arm, f"{arm},{size}", seed, folder, link, config, experiment.audit))
    return found


def identity(config: Mapping[str, Any], audit: bool = False) -> str:
    """Twelve letters that name what a run computes, whatever its seed."""
    what = {"audit": audit, **compare_settings.changed(config)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def held(results: Path, lines: Sequence[Line]) -> tuple[list[Run], set[Path]]:
    """The runs of a results file, under the names that their arms have now, and the folders of the lines
    among them. A run that was stored before it was finished is left out."""
    stored = compare_runs.unpack(results) if results.is_file() else []
    known = {(line.folder.parent.name, line.seed): line for line in lines}
    keys = [(identity(run.config), run.seed) for run in stored]
    own: dict[tuple[str, int], str] = {}  # beside a run may lie the best of its images, by a longer name
    for key, run in zip(keys, stored, strict=True):
        own[key] = min(own.get(key, run.arm), run.arm, key=len)
    runs, folders = [], set()
    for key, run in zip(keys, stored, strict=True):
        line = known.get(key)
        if line is not None and run.points[-1].epoch < line.config.train.epochs:
            continue
        if line is not None:
            folders.add(line.folder)
            run = dataclasses.replace(run, arm=line.arm + run.arm.removeprefix(own[key]))
        runs.append(run)
    return runs, folders


def join(line: Line) -> Path:
    """Make the link of a line's arm, and return the run's folder under the arm's name."""
    line.link.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.path.relpath(line.folder.parent, line.link.parent))
    if line.link.is_symlink() and Path(os.readlink(line.link)) != target:
        line.link.unlink()  # the experiment's file was changed since
    try:
        line.link.symlink_to(target, target_is_directory=True)
    except FileExistsError:
        if not line.link.is_symlink():
            raise UserError(f"{line.link}: is in the way, wanted a free name for an experiment") from None
    return line.link / f"seed{line.seed}"


def price(config: Config) -> dict[str, dict[str, int]]:
    """Calls of a whole training, and of one evaluated picture, counted without weights or a device."""
    pipe = abstract.pipeline(config.model.path, config.model.dtype, config.model.t5_length)
    times = assemble.time_grid(config, pipe, config.sampler.steps)
    shape = assemble.rollout_shape(config, pipe, times)
    masks = traced.credit_masks(config, times, 0, np.ones(config.prompts.groups, bool))
    epoch = cost.epoch(shape, assemble.recipe(config), config, masks, pipe.calls)
    searched = 0
    if config.eval.search and searched_steps(config):
        steps = config.sampler.eval_steps
        grid = assemble.time_grid(config, pipe, steps)
        searched = int(window.step_mask(config.search.steps, steps, grid).sum())
    tried = cost.candidates(config, 1, searched)
    calls = pipe.calls(config.sampler.eval_guidance)
    picture = {
        "velocity": (config.sampler.eval_steps + tried * config.search.lookahead) * calls,
        "backward": 0,
        "decode": 1 + tried,
        "reward": 1 + tried,
    }
    return {
        "training": {name: epoch[name] * config.train.epochs for name in compare_runs.CALLS},
        "picture": picture,
    }


def total(line: Line, known: dict[str, dict[str, dict[str, int]]]) -> dict[str, int]:
    """All calls of a run with its evaluations; `known` keeps what was counted for its arm."""
    if line.audit:
        return dict.fromkeys(compare_runs.CALLS, 0)
    key = line.folder.parent.name
    if key not in known:
        known[key] = price(line.config)
    config, found = line.config, known[key]
    every = config.eval.every
    rounds = 1 if config.train.epochs == 0 else 2 + (config.train.epochs - 1) // every if every else 2
    pictures = rounds * (config.eval.prompts or ALL) * config.eval.seeds
    return {n: found["training"][n] + pictures * found["picture"][n] for n in compare_runs.CALLS}
