"""The embeddings of a run: every prompt that it will need, encoded once, before the transformer is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Conditioning, Prompt, negative_of
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.data.embeddings import Embeddings
from smart_grpo_jax.hub import text as hub
from smart_grpo_jax.hub.locate import EMBEDDED
from smart_grpo_jax.hub.tokenizers import Tokenizer
from smart_grpo_jax.runtime.progress import say


def embed(config: Config, prompts: prompt_data.PromptSet, held_out: Sequence[str], epochs: int) -> Embeddings:
    """Embeddings of the negative prompt, of the evaluation's prompts and of those that `epochs` will draw.

    Where a prompt has a negative prompt of its own and guidance reads it, that is embedded too. What the
    cache holds is not encoded again; where it holds everything, no encoder is loaded.
    """
    model, negative = config.model, config.prompts.negative
    fingerprint = hub.text_fingerprint(model.path, model.dtype, model.t5_length)
    texts = [*held_out, *drawn(config, prompts, epochs)]  # a text may come twice, with two negatives
    own = guides(config) and any(has_negative(p) for p in (*held_out, *prompts.prompts))
    if own and not hub.reads_negative(model.path):
        raise UserError(
            f"{prompts.source}: has prompts with a negative_prompt, which {model.path} never reads"
        )
    negatives = [negative_of(text, negative) for text in texts] if own else []
    wanted = list(dict.fromkeys([negative, *texts, *negatives]))
    store = Embeddings(
        encoder(config),
        fingerprint,
        cache_folder(config),
        batch=hub.BATCH,
        negative=negative if own else None,
    )
    for line in cut(hub.load_tokenizers(model.path, model.t5_length), wanted):
        say(line)
    store.ensure(wanted)
    store.release()
    return store


def guides(config: Config) -> bool:
    """Does anything in this run lead away from a negative prompt?"""
    sampler = config.sampler
    return max(sampler.guidance, sampler.eval_guidance, config.search.guidance) > 1


def has_negative(prompt: str) -> bool:
    """Does the prompt come with a negative prompt of its own?"""
    return isinstance(prompt, Prompt) and prompt.negative is not None


def cut(tokenizers: Mapping[str, Tokenizer], prompts: Sequence[str]) -> list[str]:
    """A line for each kind of tokenizer to whose length some prompts are cut."""
    counts: dict[str, int] = {}
    for tokenizer in tokenizers.values():
        kind = f"{tokenizer.length} {tokenizer.kind} tokens"
        if kind not in counts:
            counts[kind] = prompt_data.over_long(prompts, tokenizer.truncated)
    return [
        f"{count:,} of {len(prompts):,} prompts are longer than {kind} and are cut"
        for kind, count in counts.items()
        if count
    ]


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
