"""Tiny random pipelines in the published format, shaped like SD3.5-M, SD3.5-L, SD3.0 and FLUX."""

import copy
import json

import jax
import numpy as np

from smart_grpo_jax.hub import pipeline
from smart_grpo_jax.hub.families import FAMILIES, NETWORKS
from smart_grpo_jax.models.presets import TINY
from smart_grpo_jax.worlds.shapes import vocabulary

WORDS = ["a", "red", "circle", "above", "blue", "square", "two", "green"]
PROMPTS = ["a red circle", "two green square above a blue circle!", ""]

T5 = {
    "vocab_size": 64,
    "d_model": 24,
    "d_ff": 40,
    "d_kv": 6,
    "num_heads": 3,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "decoder_start_token_id": 0,
}

SD3 = {**TINY["transformer"], "_class_name": "SD3Transformer2DModel"}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [2, 4, 2],
}
CLIP = {**TINY["text_encoder"], "projection_dim": 12}  # unlike the hidden size of 8
LARGE = {"dual_attention_layers": [], "num_attention_heads": 3, "caption_projection_dim": 24}

SHAPES = {
    "sd35-medium": {"transformer": SD3},
    "sd35-large": {"transformer": {**SD3, **LARGE}, "text_encoder_3": T5},
    "sd3": {"transformer": {**SD3, "dual_attention_layers": [], "qk_norm": None}, "text_encoder_3": T5},
    "all-dual": {
        "transformer": {**SD3, "dual_attention_layers": [0, 1, 2], "patch_size": 2, "sample_size": 6}
    },
    "flux": {"transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": T5},
    "schnell": {
        "transformer": {**FLUX, "guidance_embeds": False, "num_attention_heads": 2},
        "text_encoder": CLIP,
        "text_encoder_2": T5,
    },
}

SCHEDULERS = {
    "flux": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"shift": 1.0},
}


def t5_tokenizer():
    """tokenizer.json of a small Unigram vocabulary that begins and ends like T5's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - i / 10) for i, word in enumerate(WORDS)]
    pieces += [(letter, -6.0 - i / 10) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz!,.")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps({"model_max_length": 512, "extra_ids": 0}),
    }


def random_tree(shapes, rng):
    """Every parameter random and of unit gain, so that no branch hides behind a zero."""

    def leaf(s):
        fan = np.prod(s.shape[:-1]) if len(s.shape) > 1 else 25
        return (rng.standard_normal(s.shape) / np.sqrt(max(fan, 1))).astype(np.float32)

    return jax.tree.map(leaf, shapes)


def write(root, name="sd35-medium", seed=0, **changes):
    """A pipeline of this shape in `root`; `changes` are merged into its networks' configs."""
    rng = np.random.default_rng(seed)
    networks = copy.deepcopy({**{k: v for k, v in TINY.items() if k == "vae"}, **SHAPES[name]})
    flux = "Flux" in networks["transformer"]["_class_name"]
    family = FAMILIES["FluxPipeline" if flux else "StableDiffusion3Pipeline"]
    for component in family.networks:
        if component in TINY and component not in networks:
            networks[component] = copy.deepcopy(TINY[component])
    parts = {}
    for component, data in networks.items():
        data |= changes.get(component, {})
        class_name = family.networks[component]
        network = NETWORKS[class_name]
        full = {**data, "architectures": [class_name]} if network.library == "transformers" else data
        parts[component] = (data, random_tree(network.table.abstract(network.config.from_json(full)), rng))
    clip = {"tokenizer": vocabulary.END, "tokenizer_2": "!"}
    tokenizers = {
        tokenizer: t5_tokenizer()
        if family.networks[component] == "T5EncoderModel"
        else vocabulary.files(WORDS, clip[tokenizer])
        for component, tokenizer in family.tokenizers.items()
        if component in parts
    }
    scheduler = SCHEDULERS.get(name, {"shift": 3.0})
    pipeline.save_pipeline(
        root, tokenizers=tokenizers, scheduler={"num_train_timesteps": 1000, **scheduler}, **parts
    )
    return root
