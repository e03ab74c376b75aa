"""`search.steps = auto`: the window that an audit recommends, measured once and then part of the run.

Where it comes from, first to last: a checkpoint of the run (so that a resumed run searches the same steps,
whatever has become of the file), audit.json in the run folder if it fits, an audit made on the spot.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import assemble, audit, audit_report
from smart_grpo_jax.jobs.audit_report import Audit
from smart_grpo_jax.policy import cost
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.manifest import Damaged, read_manifest
from smart_grpo_jax.runtime.progress import Heartbeat, say

AUTO = "auto"


class Measured(NamedTuple):
    """A config whose searched steps are known, and the calls that finding them has cost."""

    config: Config
    nfe: dict[str, int]


def settled(config: Config, workdir: Path) -> Measured:
    """The config to train with; measures, and writes audit.json, where nothing is known yet."""
    found = known(config, workdir)
    if found is not None or config.search.steps != AUTO:
        return found or Measured(config, dict(cost.NOTHING))
    say("search.steps=auto: measuring at which steps the search pays")
    measured = measure(config)
    if distributed.is_main():
        audit.store(measured, workdir)
    say(audit_report.text(measured))
    return chosen(config, measured)


def asked(config: Config, workdir: str | Path) -> Config:
    """The config of a job that only looks (evaluation, pictures): it never measures."""
    if config.search.steps != AUTO:
        return config
    if not config.eval.search:
        return with_steps(config, "all")
    found = known(config, Path(workdir))
    if found is None:
        raise UserError(
            f"search.steps: got auto, but {workdir} has no audit.json that fits; run --mode=rewards --audit "
            "with this config and --workdir, or give the steps"
        )
    return found.config


def known(config: Config, workdir: Path) -> Measured | None:
    """The window of the run's checkpoints, or of its audit.json; None where there is neither."""
    if config.search.steps != AUTO:
        return None
    stored = in_checkpoint(workdir)
    file = in_file(config, workdir) if stored is None else None
    # the processes of a run see one disk, but not at the same moment
    if not distributed.any_process(stored is not None or file is not None):
        return None
    if stored is not None:
        return Measured(with_steps(config, stored), dict(cost.NOTHING))
    file = file or in_file(config, workdir)
    return chosen(config, file) if file else None


def in_checkpoint(workdir: Path) -> str | None:
    """What the newest readable checkpoint says was searched."""
    folder = workdir / "checkpoints"
    epochs = [int(p.name) for p in folder.glob("*") if p.name.isdigit()] if folder.is_dir() else []
    for epoch in sorted(epochs, reverse=True):
        try:
            return read_manifest(folder / str(epoch))["meta"].get("searched")
        except (Damaged, OSError, KeyError, ValueError):
            continue
    return None


def in_file(config: Config, workdir: Path) -> Audit | None:
    """audit.json, if it holds for this config; what speaks against it is said."""
    path = workdir / "audit.json"
    if not path.exists():
        return None
    try:
        found = audit_report.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"{path}: is not an audit ({type(error).__name__}); measured anew")
        return None
    if differs := difference(found.holds_for, audit_report.identity(config)):
        say(f"{path}: does not fit this config ({differs}); measured anew")
        return None
    return found


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first field in which two identities differ, in words; empty where none does."""
    new = json.loads(json.dumps(new))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            return f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
    return ""


def measure(config: Config) -> Audit:
    """A small audit of the policy that the run begins with, with its own seed."""
    searching = audit.searching(config)
    with Heartbeat("loading"):
        run = assemble.assemble(searching, audit.items(config), training=False)
    return audit.measure(run, run.state().params, audit.noisy(config), "base")


def chosen(config: Config, found: Audit) -> Measured:
    """The config with the window of the audit; UserError where the audit found none."""
    if not found.usable:
        raise UserError(
            "search.steps: got auto, but no step with noise gains beyond doubt when it is searched "
            f"({found.prompts} prompts × {found.members} images, see audit.json); give the steps, set "
            "search.rounds=0, or remove audit.json and raise audit.prompts"
        )
    return Measured(with_steps(config, audit_report.span(found, found.usable)), dict(found.nfe))


def with_steps(config: Config, steps: str) -> Config:
    """The config with these steps searched."""
    return dataclasses.replace(config, search=dataclasses.replace(config.search, steps=steps))
