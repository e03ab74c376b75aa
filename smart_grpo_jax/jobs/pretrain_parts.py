"""The networks of the embedded world before they have learned anything: sizes, captions, first weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from smart_grpo_jax.core.types import Conditioning, PyTree
from smart_grpo_jax.hub.folder import write_text
from smart_grpo_jax.hub.text import text_states
from smart_grpo_jax.hub.tokenizers import load_tokenizer
from smart_grpo_jax.models.clip import CLIPConfig, CLIPText
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig
from smart_grpo_jax.models.vae import VAEConfig
from smart_grpo_jax.worlds.shapes import grammar, vocabulary

QUIET = 4.0
"""How strongly queries start out turned away from the empty T5 tokens (see `quiet_start`)."""


NULL_TOKENS = 256
"""Empty T5 tokens that diffusers appends to the text of a pipeline without T5."""


class Parts(NamedTuple):
    """The networks of the pipeline, by config."""

    vae: VAEConfig
    transformer: MMDiTConfig
    text: CLIPConfig
    text_2: CLIPConfig


def world(words: int) -> Parts:
    """The sizes of the embedded world: an SD3.5-M in small, with both kinds of attention and the same 8×
    autoencoder of 16 channels."""
    text = CLIPConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=96,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=vocabulary.LENGTH,
        hidden_act="quick_gelu",
        eos_token_id=words - 1,
    )
    return Parts(
        vae=VAEConfig(
            block_out_channels=(8, 16, 16, 32),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=24,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=MMDiTConfig(
            sample_size=3,
            patch_size=1,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=96,
            caption_projection_dim=96,
            pooled_projection_dim=80,
            pos_embed_max_size=6,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        text=text,
        text_2=dataclasses.replace(
            text,
            hidden_size=48,
            intermediate_size=144,
            projection_dim=48,
            num_attention_heads=3,
            hidden_act="gelu",
        ),
    )


def tokenizers(folder: Path) -> tuple[dict[str, dict[str, str]], tuple[Any, Any]]:
    """The files of both tokenizers (written, too) and the tokenizers; as in SD3, the second pads with "!"."""
    files = {
        "tokenizer": vocabulary.files(grammar.WORDS, vocabulary.END),
        "tokenizer_2": vocabulary.files(grammar.WORDS, "!"),
    }
    for name, contents in files.items():
        for file, text in contents.items():
            write_text(folder / name / file, text)
    return files, (load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "tokenizer_2"))


class Captions(NamedTuple):
    """Token ids of every prompt of the grammar for both encoders; row 0 is the empty prompt, row 1 + i
    belongs to the i-th smallest `code`."""

    code: Int[Array, " n"]
    ids: Int[Array, "n+1 s"]
    ids_2: Int[Array, "n+1 s"]

    def rows(self, spec: Int[Array, "b 7"]) -> Int[Array, " b"]:
        """The rows of these prompts."""
        return 1 + jnp.searchsorted(self.code, spec_code(spec))


def spec_code(spec: Int[Array, "n 7"]) -> Int[Array, " n"]:
    """One number per spec row (mixed radix; -1, "unsaid", is digit 0)."""
    code = jnp.zeros(spec.shape[0], jnp.int32)
    for column, radix in enumerate((6, 6, 7, 5, 7, 5, 5)):
        code = code * radix + spec[:, column] + 1
    return code


def captions(tokenizers: tuple[Any, Any]) -> Captions:
    """The table of all captions."""
    texts = [grammar.text(prompt) for prompt in grammar.all_prompts()]
    code = np.asarray(spec_code(jnp.asarray(grammar.encode(texts))))
    order = np.argsort(code)
    ordered = ["", *(texts[i] for i in order)]
    ids = [jnp.asarray(tokenizer(ordered), jnp.int32) for tokenizer in tokenizers]
    return Captions(jnp.asarray(code[order]), ids[0], ids[1])


def condition(
    parts: Parts, params: PyTree, ids: Int[Array, "b s"], ids_2: Int[Array, "b s"], repeats: int
) -> Conditioning:
    """The SD3 prompt embedding without T5: both penultimate states side by side, then one zero token."""
    encoders = (params["text_encoder"], params["text_encoder_2"])
    states, pooled = text_states((parts.text, parts.text_2), jnp.float32, encoders, (ids, ids_2))
    pad = parts.transformer.joint_attention_dim - states.shape[-1]
    return Conditioning(jnp.pad(states, ((0, 0), (0, 1), (0, pad))), pooled, repeats)


def fresh_flow(parts: Parts, key: Array, latent: tuple[int, ...], text: Captions) -> PyTree:
    """Random transformer and text encoders."""
    c, keys = parts.transformer, jax.random.split(key, 3)
    tokens, pooled = jnp.zeros((1, 2, c.joint_attention_dim)), jnp.zeros((1, c.pooled_projection_dim))
    transformer = MMDiT(c).init(keys[0], jnp.zeros((1, *latent)), jnp.ones(1), tokens, pooled)["params"]
    return {
        "transformer": quiet_start(transformer, c.num_attention_heads, c.attention_head_dim),
        "text_encoder": CLIPText(parts.text).init(keys[1], text.ids[:1])["params"],
        "text_encoder_2": CLIPText(parts.text_2).init(keys[2], text.ids_2[:1])["params"],
    }


def quiet_start(params: PyTree, heads: int, dim: int) -> PyTree:
    """Turn all queries away from the empty tokens in the joint attention.

    Without T5 the text ends in 256 equal zero tokens, which at a random start take 92 % of all attention
    and hide the few tokens that matter. One feature of each head is set aside: queries carry -QUIET there,
    text keys 1; a zero token has nothing else, so its normalised key lies along that feature.
    """
    query = np.zeros((heads, dim), np.float32)
    key = np.zeros((heads, dim), np.float32)
    query[:, 0], key[:, 0] = -QUIET, 1.0
    start = {"to_q": query, "add_q_proj": query, "add_k_proj": key}
    for stack in ("dual", "joint", "last"):
        if stack in params:
            for name, bias in start.items():
                if name in params[stack]["attn"]:
                    old = params[stack]["attn"][name]["bias"]
                    params[stack]["attn"][name]["bias"] = old + bias.reshape(-1)
    return params
