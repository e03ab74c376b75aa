"""The vocabulary that all floors share: what crosses a border between two of them.

Latents and images are NHWC; images are float32 in [0, 1]; times are sigma (1 = noise, 0 = data).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int

PyTree: TypeAlias = Any

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Prompt(str):
    """A prompt that carries what its file says of it: the text itself, wherever a text is wanted.

    `metadata` reaches the rewards; `negative` is this prompt's own negative prompt (None: the run's).
    """

    metadata: Mapping[str, Any]
    negative: str | None

    def __new__(
        cls, text: str, metadata: Mapping[str, Any] = NO_METADATA, negative: str | None = None
    ) -> Prompt:
        """The text with its metadata."""
        prompt = super().__new__(cls, text)
        prompt.metadata, prompt.negative = metadata, negative
        return prompt


def metadata_of(prompt: str) -> Mapping[str, Any]:
    """What is known of a prompt beside its text; nothing for a plain text."""
    return prompt.metadata if isinstance(prompt, Prompt) else NO_METADATA


def negative_of(prompt: str, default: str) -> str:
    """The prompt's own negative prompt, or the run's."""
    own = prompt.negative if isinstance(prompt, Prompt) else None
    return default if own is None else own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a prompt becomes: one row per prompt.

    `repeats` says that the last token stands for so many identical ones. A pipeline without T5 pads the
    text with equal zero tokens; nothing tells them apart, so they stay equal through every layer, and
    one token whose attention logit is raised by log(repeats) gives the same numbers.

    `negative` is what guidance leads away from, row by row; None: one negative prompt serves all rows.
    """

    tokens: Float[Array, "b s d"]
    pooled: Float[Array, "b p"]
    repeats: int = dataclasses.field(default=1, metadata={"static": True})
    negative: Conditioning | None = None

    def rows(self, index: Array) -> Conditioning:
        """The conditioning of the given rows of the table."""
        return jax.tree.map(lambda a: a[index], self)


class Scores(NamedTuple):
    """The verdict of a reward: `value` counts only where `ok`; `parts` holds each summand for the log."""

    value: Float[Array, " b"]
    ok: Bool[Array, " b"]
    parts: dict[str, Float[Array, " b"]]


VelocityFn: TypeAlias = Callable[[PyTree, Array, Array, Conditioning], Array]
"""velocity(params, x[b,h,w,c], t[b], cond) -> v[b,h,w,c]; guidance is inside, as one doubled batch."""

DecodeFn: TypeAlias = Callable[[PyTree, Array], Array]
"""decode(params, x0[b,h,w,c]) -> images[b,H,W,3] in [0,1]."""

ScoreFn: TypeAlias = Callable[[PyTree, Array, PyTree, Array | None], Scores]
"""score(params, images[b,H,W,3], ctx, t) -> Scores; pure and jit-safe; t is the noise level of a
one-step decode, None for a finished image; ctx holds what the reward knows of each image's prompt."""


class Transitions(NamedTuple):
    """States of the sampler and the moves tried from each: m states, k moves per state.

    Flow-GRPO has k = 1 (the executed step); local credit has one move per candidate of the search.
    """

    x: Float[Array, "m h w c"]
    x_next: Float[Array, "m k h w c"]
    step: Int[Array, " m"]
    log_prob: Float[Array, "m k"]
    mean: Float[Array, "m h w c"]
    advantage: Float[Array, "m k"]
    weight: Float[Array, "m k"]
    row: Int[Array, " m"]


class Endpoints(NamedTuple):
    """Finished latents, for the likelihood-free losses."""

    x0: Float[Array, "m h w c"]
    advantage: Float[Array, " m"]
    weight: Float[Array, " m"]
    row: Int[Array, " m"]


class TrainState(NamedTuple):
    """All that a run must carry from one epoch to the next; the root key and the prompt order are
    functions of the seed and are not state."""

    epoch: Int[Array, ""]
    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    counters: dict[str, Array]
