"""The one place that names random numbers.

A key is a function of what it is for, (seed, stream, epoch, prompt, member, step, round), and of nothing
else: not of the batch layout, the number of devices, or what was drawn before. So noise survives a
restart and a change of machine. Every index may be traced and vmapped.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, ArrayLike

from smart_grpo_jax.maths.choice import choose

# Numbers are part of the meaning of a seed: never reuse or renumber one.
STREAMS = {
    "prompts": 0,
    "init": 1,
    "latent": 2,
    "noise": 3,
    "search": 4,
    "update": 5,
    "eval": 6,
    "dropout": 7,
    "pretrain": 8,
    "sample": 9,
}


def key(
    seed: ArrayLike, stream: str, epoch: ArrayLike = 0, prompt: ArrayLike = 0, member: ArrayLike = 0
) -> Array:
    """The key of one use; `prompt` is the prompt's place in the epoch and `member` its place in the group."""
    # Named, because the default generator can be changed from outside and not all of them are
    # independent of the batch layout.
    root = jax.random.key(seed, impl="threefry2x32")
    return _fold(root, choose(STREAMS, stream, "random stream"), epoch, prompt, member)


def at(key: Array, step: ArrayLike, round: ArrayLike = 0) -> Array:
    """The key of one step of the sampler, and of one round of the search there."""
    return _fold(key, step, round)


def _fold(key: Array, *indices: ArrayLike) -> Array:
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key
