"""The embeddings of a run: every prompt that it will need, encoded once, before the transformer is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import Conditioning
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.data.embeddings import Embeddings
from smart_grpo_jax.hub import text as hub
from smart_grpo_jax.hub.locate import EMBEDDED


def embed(config: Config, prompts: prompt_data.PromptSet, held_out: Sequence[str], epochs: int) -> Embeddings:
    """Embeddings of the negative prompt, of the evaluation's prompts and of those that `epochs` will draw.

    What the cache holds is not encoded again; where it holds everything, no encoder is loaded.
    """
    model = config.model
    fingerprint = hub.text_fingerprint(model.path, model.dtype, model.t5_length)
    store = Embeddings(encoder(config), fingerprint, cache_folder(config), batch=hub.BATCH)
    store.ensure([config.prompts.negative, *held_out, *drawn(config, prompts, epochs)])
    store.release()
    return store


def encoder(config: Config) -> Callable[[Sequence[str]], Conditioning]:
    """An encode function that loads the encoders when it is first called; they go with it."""
    loaded: list[hub.Text] = []

    def encode(texts: Sequence[str]) -> Conditioning:
        if not loaded:
            model = config.model
            loaded.append(hub.load_text(model.path, model.dtype, model.t5_length))
        return loaded[0].encode(texts, compact=True)

    return encode


def cache_folder(config: Config) -> Path | None:
    """Where embeddings are kept; None: in memory alone."""
    wanted = config.prompts.cache
    if wanted == "off" or (wanted == "auto" and config.model.path == EMBEDDED):
        return None
    if wanted != "auto":
        return Path(wanted)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "smart_grpo_jax" / "prompts"


def drawn(config: Config, prompts: prompt_data.PromptSet, epochs: int) -> list[str]:
    """The prompts that the epochs will draw, in order of their first use."""
    count, groups = len(prompts.prompts), config.prompts.groups
    draws = (prompt_data.epoch_groups(count, groups, config.seed, epoch) for epoch in range(epochs))
    return list(dict.fromkeys(prompts.prompts[i] for draw in draws for i in draw))
