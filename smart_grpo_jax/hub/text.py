"""Prompts → conditioning: the tokenizers and text encoders of a pipeline, which training needs only once.

SD3    tokens = [CLIP-L | CLIP-G | 0], then T5 (zeros where it is absent); pooled = [CLIP-L | CLIP-G]
FLUX   tokens = T5; pooled = CLIP-L
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Conditioning, PyTree
from smart_grpo_jax.hub import folder
from smart_grpo_jax.hub.folder import Layout
from smart_grpo_jax.hub.locate import pipeline_folder
from smart_grpo_jax.hub.tokenizers import Tokenizer, load_t5_tokenizer, load_tokenizer
from smart_grpo_jax.models.clip import CLIPConfig, CLIPOutput, CLIPText
from smart_grpo_jax.models.t5 import T5Config, T5Encoder

BATCH = 16
"""Prompts encoded at once; smaller calls are filled up, so that there is one program and a prompt's
embedding does not depend on the company that it is encoded in."""

FORMAT = "embeddings 2"
"""Changed whenever equal files come to give other embeddings, or parts are written in another way."""

T5_BATCH = 8
"""The same where T5 is among the encoders: its attention logits are 64 heads × length² per prompt."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def text_states(
    configs: Sequence[CLIPConfig],
    dtype: Any,
    params: Sequence[PyTree],
    ids: Sequence[Int[Array, "b s"]],
) -> tuple[Float[Array, "b s d"], Float[Array, "b p"]]:
    """CLIP encoders side by side: penultimate states and pooled vectors, joined along the features."""
    outs = [
        cast(CLIPOutput, CLIPText(config, dtype).apply({"params": p}, one))
        for config, p, one in zip(configs, params, ids, strict=True)
    ]
    states = jnp.concatenate([o.penultimate for o in outs], -1)
    return states, jnp.concatenate([o.pooled for o in outs], -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def t5_states(config: T5Config, dtype: Any, params: PyTree, ids: Int[Array, "b s"]) -> Float[Array, "b s d"]:
    """The last states of T5, float32."""
    return cast(Array, T5Encoder(config, dtype).apply({"params": params}, ids)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """The text side of a pipeline, by component; `width` is what the transformer reads per token."""

    configs: Mapping[str, CLIPConfig | T5Config]
    tokenizers: Mapping[str, Tokenizer]
    params: Mapping[str, PyTree]
    join: str
    width: int
    t5_length: int
    dtype: Any

    @property
    def clips(self) -> tuple[str, ...]:
        """The components that are CLIP encoders."""
        return tuple(name for name, config in self.configs.items() if isinstance(config, CLIPConfig))

    @property
    def t5(self) -> str | None:
        """The component that is a T5 encoder, if there is one."""
        return next((name for name, config in self.configs.items() if isinstance(config, T5Config)), None)

    @property
    def batch(self) -> int:
        """Prompts encoded at once."""
        return T5_BATCH if self.t5 else BATCH

    def encode(self, prompts: Sequence[str], compact: bool = False) -> Conditioning:
        """One row per prompt. With `compact`, one zero token stands for all those of an absent T5
        (`Conditioning.repeats`)."""
        if isinstance(prompts, str):
            raise UserError("encode: got one string, wanted a list of prompts")
        if not prompts:
            raise UserError("encode: got no prompt")
        step = self.batch
        parts = [self._encode(prompts[i : i + step]) for i in range(0, len(prompts), step)]
        states, pooled, t5 = (
            jnp.concatenate(part) if part[0] is not None else None for part in zip(*parts, strict=True)
        )
        return JOINS[self.join](self, states, pooled, t5, compact)

    def _encode(self, prompts: Sequence[str]) -> tuple[Array, Array, Array | None]:
        """At most `batch` prompts through all encoders."""
        filled = [*prompts, *[""] * (self.batch - len(prompts))]
        ids = {name: jnp.asarray(tokenizer(filled)) for name, tokenizer in self.tokenizers.items()}
        each = [tuple(tree[name] for name in self.clips) for tree in (self.configs, self.params, ids)]
        states, pooled = text_states(each[0], self.dtype, each[1], each[2])
        t5 = None
        if name := self.t5:
            config = cast(T5Config, self.configs[name])
            t5 = t5_states(config, self.dtype, self.params[name], ids[name])[: len(prompts)]
        return states[: len(prompts)], pooled[: len(prompts)], t5


def sd3(text: Text, states: Array, pooled: Array, t5: Array | None, compact: bool) -> Conditioning:
    """CLIP's tokens widened with zeros, then T5's, or the zeros that stand for them."""
    length = text.t5_length
    repeats = max(length, 1) if compact and t5 is None else 1
    absent = min(length, 1) if repeats > 1 else length
    after = absent if t5 is None else 0
    tokens = jnp.pad(states, ((0, 0), (0, after), (0, text.width - states.shape[-1])))
    return Conditioning(tokens if t5 is None else jnp.concatenate([tokens, t5], 1), pooled, repeats)


def flux(text: Text, states: Array, pooled: Array, t5: Array | None, compact: bool) -> Conditioning:
    """T5's tokens; CLIP gives the pooled vector alone."""
    del states, compact
    assert t5 is not None
    return Conditioning(t5, pooled)


JOINS: Mapping[str, Callable[..., Conditioning]] = {"StableDiffusion3Pipeline": sd3, "FluxPipeline": flux}


def load_text(
    path: str | Path,
    dtype: str = "float32",
    t5_length: int = 256,
    *,
    layout: Layout = folder.default_device,
) -> Text:
    """The text side alone, so that it can be used and dropped before the transformer is loaded."""
    root, kept = pipeline_folder(path), folder.compute_type(dtype)
    family, _ = folder.index(root)
    classes = {name: kind for name, kind in folder.components(root).items() if name in family.text}
    configs = {name: folder.read_config(root, name, kind) for name, kind in classes.items()}
    params = {
        name: folder.read_params(root, name, kind, configs[name], kept, layout)
        for name, kind in classes.items()
    }
    width = folder.read_config(root, "transformer", family.networks["transformer"]).joint_attention_dim
    return Text(
        configs=configs,
        tokenizers=load_tokenizers(path, t5_length),
        params=params,
        join=family.name,
        width=width,
        t5_length=t5_length,
        dtype=kept,
    )


def load_tokenizers(path: str | Path, t5_length: int = 256) -> dict[str, Tokenizer]:
    """The tokenizers alone, by the component that they serve."""
    root = pipeline_folder(path)
    family, _ = folder.index(root)
    tokenizers: dict[str, Tokenizer] = {}
    length = None  # diffusers takes the first tokenizer's length for every CLIP
    for name, kind in folder.components(root).items():
        if name not in family.text:
            continue
        place = root / family.tokenizers[name]
        if isinstance(folder.read_config(root, name, kind), T5Config):
            tokenizers[name] = load_t5_tokenizer(place, t5_length)
        else:
            tokenizers[name] = load_tokenizer(place, length)
            length = tokenizers[name].length
    return tokenizers


def reads_negative(path: str | Path) -> bool:
    """Does guidance lead this kind of pipeline away from a negative prompt?"""
    return folder.index(pipeline_folder(path))[0].doubles


def text_fingerprint(path: str | Path, dtype: str, t5_length: int) -> str:
    """A hash of all that decides a prompt's embedding, without loading the encoders."""
    root = pipeline_folder(path)
    family, _ = folder.index(root)
    found = hashlib.sha256(f"{FORMAT} {family.name} {dtype} {t5_length}".encode())
    for name, kind in sorted(folder.components(root).items()):
        if name not in family.text:
            continue
        found.update(repr(folder.read_config(root, name, kind)).encode())
        found.update(folder.open_weights(root, name, kind).fingerprint().encode())
        for file in sorted((root / family.tokenizers[name]).iterdir()):
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:32]
