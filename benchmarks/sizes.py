"""What configs ask for, counted without weights: `python benchmarks/sizes.py configs/sd35_medium.py:1024`.

Parameters, bytes of the frozen and the trained state, operations of one forward (our own counter, maths/
flops.py), network calls and operations of an epoch. Nothing is compiled or allocated, so a laptop counts
FLUX; activations are not counted. The models are the published ones by preset, whatever is on the disk.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.types import Conditioning
from smart_grpo_jax.hub import abstract, functions
from smart_grpo_jax.hub.families import NETWORKS
from smart_grpo_jax.hub.pipeline import Pipeline
from smart_grpo_jax.jobs import assemble, traced
from smart_grpo_jax.main import run_file
from smart_grpo_jax.maths import flops
from smart_grpo_jax.policy import cost

CLIP_TOKENS = 77


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print a table and a line of JSON per config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", nargs="+", help="config files, with their words")
    for given in parser.parse_args(argv).configs:
        found = count(given)
        print(line(given, found))
        print(json.dumps({"config": given, **found}))
    return 0


def count(given: str) -> dict[str, Any]:
    """The numbers of one config."""
    config = configs.from_dict(run_file(given))
    pipe = abstract_pipeline(config)
    size = config.model.resolution or None
    latent = pipe.latent_shape(size)
    net = pipe.transformer
    text = config.model.t5_length + CLIP_TOKENS * pipe.family.doubles
    trainable, base = trained(config, pipe), weights_of(pipe)
    forward = flops.count(
        functions.velocity_fn(net),
        {"params": base},
        shape(1, *latent),
        shape(1),
        Conditioning(shape(1, text, net.joint_attention_dim), shape(1, net.pooled_projection_dim)),  # type: ignore[arg-type]
        *((shape(),) if net.embeds_guidance else ()),
    )
    vae = NETWORKS["AutoencoderKL"].table.abstract(pipe.vae)
    decode = flops.count(functions.decode_fn(pipe.vae), vae, shape(1, *latent))
    calls = epoch_calls(config, pipe)
    numbers = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    width = jnp.dtype(pipe.dtype).itemsize
    return {
        "parameters": numbers(base),
        "trained": numbers(trainable),
        "image_tokens": pipe.image_tokens(size),
        "text_tokens": text,
        "forward_tflop": forward / 1e12,
        "decode_tflop": decode / 1e12,
        "frozen_gb": (width * numbers(base) + 4 * numbers(vae)) / 1e9,
        "state_gb": 16 * numbers(trainable) / 1e9,  # float32: weights, average, Adam's two moments
        **{f"{name}_calls": number for name, number in calls.items()},
        # a backward pass is two forwards' worth
        "epoch_pflop": (
            forward * (calls["velocity"] + 2 * calls["backward"]) + decode * calls["decode"]
        ) / 1e15,
    }  # fmt: skip


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    """A float32 array that is not there."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def abstract_pipeline(config: configs.Config) -> Pipeline:
    """The pipeline without weights."""
    return abstract.pipeline(config.model.path, config.model.dtype, config.model.t5_length)


def weights_of(pipe: Pipeline) -> Any:
    """The transformer's parameters as shapes."""
    return pipe.weights_table.abstract(pipe.transformer)


def trained(config: configs.Config, pipe: Pipeline) -> Any:
    """What is trained, as shapes."""
    if config.adapter.kind == "full":
        return assemble.without(weights_of(pipe), pipe.transformer.fixed)
    adapter = config.adapter
    net, _, *inputs = pipe.adapter(adapter.rank, adapter.alpha, adapter.targets)
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)["lora"]


def epoch_calls(config: configs.Config, pipe: Pipeline) -> dict[str, int]:
    """Network, decoder and reward calls of an epoch."""
    times = assemble.time_grid(config, pipe, config.sampler.steps)
    rollout = assemble.rollout_shape(config, pipe, times)
    masks = traced.credit_masks(config, times, 0, np.ones(config.prompts.groups, bool))
    return cost.epoch(rollout, assemble.recipe(config), config, masks, pipe.calls)


def line(given: str, found: dict[str, Any]) -> str:
    """The numbers for a person."""
    f = found
    return (
        f"{given}\n  {f['parameters'] / 1e9:.2f} G parameters, {f['trained'] / 1e6:,.1f} M trained; "
        f"frozen {f['frozen_gb']:.1f} GB, trained state {f['state_gb']:.1f} GB\n"
        f"  {f['forward_tflop']:.2f} TFLOP a forward ({f['image_tokens']} image + {f['text_tokens']} text "
        f"tokens), {f['decode_tflop']:.2f} a decode\n"
        f"  an epoch: {f['velocity_calls']:,} network calls, {f['backward_calls']:,} backward, "
        f"{f['decode_calls']:,} decodes, {f['epoch_pflop']:,.0f} PFLOP"
    )


if __name__ == "__main__":
    sys.exit(main())
