"""The smallest run that is still a whole one, and how to look at what it leaves."""

import json
import os
from pathlib import Path

from smart_grpo_jax import main as entry
from smart_grpo_jax.runtime.metrics import read

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
from smart_grpo_jax.core import config as configs


def get_config():
    config = configs.default()
    config.adapter.kind = "full"
    config.prompts.groups = config.prompts.members = 4
    config.sampler.steps = config.sampler.eval_steps = 6
    config.sampler.guidance = config.sampler.eval_guidance = 1.0
    config.search.rounds, config.search.candidates, config.search.elite = 1, 3, 0.67
    config.search.steps = [1, 2]
    config.train.epochs = 6
    config.checkpoint.every = 2
    config.eval.every, config.eval.prompts = 3, 12
    config.log.tensorboard, config.log.samples = False, 4
    return config
"""


def command(folder, *overrides, mode="train", flags=()):
    """The arguments of the entry point for a run in `folder`."""
    path = Path(folder).parent / "tiny.py"
    if not path.exists():
        path.write_text(CONFIG)
    rest = [f"--config.{override}" for override in overrides]
    return [f"--config={path}", f"--workdir={folder}", f"--mode={mode}", *flags, *rest]


def run(folder, *overrides, mode="train", flags=()):
    """The exit code of a run in this process."""
    return entry.main(command(folder, *overrides, mode=mode, flags=flags))


def environment(**changes):
    """What a process of a test inherits; one thread of XLA's pool per device is not asked for."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def timeless(folder):
    """metrics.jsonl as text, without what depends on the clock."""
    rows = [{k: v for k, v in row.items() if not k.startswith("wall/")} for row in read(folder)]
    return [json.dumps(row) for row in rows]


def epochs(folder):
    """The finished checkpoints of a run."""
    path = Path(folder) / "checkpoints"
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def state_hash(folder):
    """What the newest checkpoint says that the state is."""
    path = Path(folder) / "checkpoints" / str(epochs(folder)[-1]) / "manifest.json"
    return json.loads(path.read_text())["state_hash"]
