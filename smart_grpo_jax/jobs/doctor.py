"""What this machine has, and a self-test of the embedded pipeline: the first thing to run, and to send."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time

import jax
import numpy as np

from smart_grpo_jax.core.errors import NumericsError
from smart_grpo_jax.hub.pipeline import load_pipeline
from smart_grpo_jax.rewards.base import load_reward
from smart_grpo_jax.runtime import compile_cache
from smart_grpo_jax.runtime.mesh import local_devices_summary
from smart_grpo_jax.runtime.progress import box, say, table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "clu", "numpy")
OPTIONAL = {"tensorflow": "tensorboard", "libtpu": "tpu", "torch": "test", "diffusers": "test"}

PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "a photo of a green triangle"]


def job() -> None:
    """`--mode=doctor`."""
    say(box("doctor", machine()))
    rows = [check() for check in (pictures_are_right, same_twice)]
    say(table(rows, ["check", "found", "verdict"]))
    if any(row[2] != "ok" for row in rows):
        raise NumericsError("doctor: the embedded pipeline does not give what it should on this machine")


def machine() -> list[tuple[str, str]]:
    """Versions, devices, optional parts and where compiled programs are kept."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    missing = [
        f"{name} (pip install smart_grpo_jax[{extra}])"
        for name, extra in OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    ]
    return [
        ("packages", ", ".join(found)),
        ("not installed", ", ".join(missing) or "nothing"),
        ("devices", local_devices_summary()),
        ("processors", str(os.cpu_count())),
        ("compile cache", str(compile_cache.enable())),
    ]


def pictures_are_right() -> list[str]:
    """The shipped model draws most of three easy prompts right."""
    started = time.monotonic()
    pipe = load_pipeline("shapes")
    wanted = PROMPTS * 8
    images = pipe.sample(wanted, key=jax.random.key(1), num_steps=10)
    score = float(np.mean(load_reward("shapes")(images, wanted)))
    seconds = time.monotonic() - started
    verdict = "ok" if score > 0.4 else "wrong"
    return ["24 pictures of easy prompts", f"graded reward {score:.3f}, {seconds:.0f} s", verdict]


def same_twice() -> list[str]:
    """Equal keys give equal bits, alone or in company."""
    pipe = load_pipeline("shapes")
    latents = jax.random.normal(jax.random.key(2), (2, *pipe.latent_shape()))
    both = np.asarray(pipe.sample(PROMPTS[:2], latents=latents, num_steps=4))
    again = np.asarray(pipe.sample(PROMPTS[:2], latents=latents, num_steps=4))
    gap = float(np.abs(both - again).max())
    return ["the same picture twice", f"largest difference {gap:g}", "ok" if gap == 0 else "wrong"]
