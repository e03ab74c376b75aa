"""The smallest run that is still a whole one, and how to look at what it leaves."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from safetensors.numpy import load_file, save_file

from smart_grpo_jax import main as entry
from smart_grpo_jax.runtime.metrics import read

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "smart_grpo_jax" / "worlds" / "shapes" / "pipeline"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"

CONFIG = """
from smart_grpo_jax.core import config as configs


def get_config():
    config = configs.default()
    config.model.path, config.prompts.cache = "{model}", "off"
    config.adapter.kind = "full"
    config.prompts.groups = config.prompts.members = 4
    config.sampler.steps = config.sampler.eval_steps = 6
    config.sampler.guidance = config.sampler.eval_guidance = 1.0
    config.search.rounds, config.search.candidates, config.search.elite = 1, 3, 0.67
    config.search.steps = [1, 2]
    config.train.epochs = 4
    config.checkpoint.every = 2
    config.eval.every, config.eval.prompts = 2, 12
    config.log.tensorboard, config.log.samples = False, 4
    return config
"""


@functools.cache
def one_layer():
    """The shipped pipeline with the last layer alone: it draws badly and compiles in half the time."""
    name = f"smart_grpo_jax-one-layer-{os.getuid()}-{zlib.crc32((SHIPPED / WEIGHTS).read_bytes()):08x}"
    folder = Path(tempfile.gettempdir()) / name
    with tempfile.TemporaryDirectory(dir=tempfile.gettempdir()) as scratch:
        made = Path(scratch) / "pipeline"
        shutil.copytree(SHIPPED, made)
        config = json.loads((made / "transformer" / "config.json").read_text())
        last = f"transformer_blocks.{config['num_layers'] - 1}."
        config |= {"num_layers": 1, "dual_attention_layers": []}
        (made / "transformer" / "config.json").write_text(json.dumps(config))
        tensors = {
            name.replace(last, "transformer_blocks.0."): tensor
            for name, tensor in load_file(made / WEIGHTS).items()
            if name.startswith(last) or not name.startswith("transformer_blocks.")
        }
        save_file(tensors, made / WEIGHTS)
        if not folder.exists():
            try:
                made.rename(folder)
            except OSError:  # another process of the tests was faster
                assert folder.exists()
    return folder


def command(folder, *overrides, mode="train", flags=()):
    """The arguments of the entry point for a run in `folder`."""
    path = Path(folder).parent / "tiny.py"
    if not path.exists():
        path.write_text(CONFIG.replace("{model}", str(one_layer())))
    rest = [f"--config.{override}" for override in overrides]
    return [f"--config={path}", f"--workdir={folder}", f"--mode={mode}", *flags, *rest]


def run(folder, *overrides, mode="train", flags=()):
    """The exit code of a run in this process."""
    return entry.main(command(folder, *overrides, mode=mode, flags=flags))


def launch(folder, processes, *overrides, devices=1, module=None, grace=30, **settings):
    """A run of several processes through launch/local.py; what `subprocess.run` gives."""
    words = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={processes}"]
    words += [
        f"--devices-per-process={devices}",
        f"--grace={grace}",
        *([f"--module={module}"] if module else []),
    ]
    words += ["--", *command(folder, *overrides)]
    env = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(folder.parent)]))
    return subprocess.run(words, env=env | settings, capture_output=True, text=True, timeout=1200)


def environment(**changes):
    """What a process of a test inherits; one thread of XLA's pool per device is not asked for."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **changes}


def timeless(folder):
    """metrics.jsonl as text, without what depends on the clock or on which epochs this process has worked."""
    process = ("wall/", "work/")
    rows = [{k: v for k, v in row.items() if not k.startswith(process)} for row in read(folder)]
    return [json.dumps(row) for row in rows]


def epochs(folder):
    """The finished checkpoints of a run."""
    path = Path(folder) / "checkpoints"
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def state_hash(folder):
    """What the newest checkpoint says that the state is."""
    path = Path(folder) / "checkpoints" / str(epochs(folder)[-1]) / "manifest.json"
    return json.loads(path.read_text())["state_hash"]
