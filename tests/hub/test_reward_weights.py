"""Every tensor of the published reward checkpoints, by name and shape at true size, finds its place.

The shapes are data written down here; nothing of that size is ever allocated.
"""

import math
import re

import jax
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import reward_weights as names
from smart_grpo_jax.hub import tables
from smart_grpo_jax.hub.fused import Split
from smart_grpo_jax.models.clip_vision import read_clip
from smart_grpo_jax.rewards import clip_models, image_reward


class Shapes:
    """A reader that knows names and shapes alone."""

    def __init__(self, shapes):
        self.shapes = shapes

    def keys(self):
        return set(self.shapes)

    def shape(self, key):
        return self.shapes[key]

    def file(self, key):
        return "published.pt"


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp(prefix, width):
    sizes = (width, 1024, 128, 64, 16, 1)
    out = {}
    for number, into, to in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        out |= linear(f"{prefix}layers.{number}", to, into)
    return out


def timm_block(at):
    return (
        norm(f"{at}.norm1", 1024)
        | linear(f"{at}.attn.qkv", 3072, 1024)
        | linear(f"{at}.attn.proj", 1024, 1024)
        | norm(f"{at}.norm2", 1024)
        | linear(f"{at}.mlp.fc1", 4096, 1024)
        | linear(f"{at}.mlp.fc2", 1024, 4096)
    )


def bert_layer(at):
    out = linear(f"{at}.intermediate.dense", 3072, 768) | linear(f"{at}.output.dense", 768, 3072)
    out |= norm(f"{at}.output.LayerNorm", 768)
    for kind, seen in (("attention", 768), ("crossattention", 1024)):
        here = f"{at}.{kind}"
        out |= linear(f"{here}.self.query", 768, 768)
        out |= linear(f"{here}.self.key", 768, seen) | linear(f"{here}.self.value", 768, seen)
        out |= linear(f"{here}.output.dense", 768, 768) | norm(f"{here}.output.LayerNorm", 768)
    return out


def published_image_reward():
    see, read = "blip.visual_encoder", "blip.text_encoder"
    out = {f"{see}.cls_token": (1, 1, 1024), f"{see}.pos_embed": (1, 197, 1024)}
    out |= {f"{see}.patch_embed.proj.weight": (1024, 3, 16, 16), f"{see}.patch_embed.proj.bias": (1024,)}
    out |= norm(f"{see}.norm", 1024)
    out |= {
        f"{read}.embeddings.word_embeddings.weight": (30524, 768),
        f"{read}.embeddings.position_embeddings.weight": (512, 768),
        f"{read}.embeddings.position_ids": (1, 512),
    }
    out |= norm(f"{read}.embeddings.LayerNorm", 768)
    for i in range(24):
        out |= timm_block(f"{see}.blocks.{i}")
    for i in range(12):
        out |= bert_layer(f"{read}.encoder.layer.{i}")
    return out | linear("blip.vision_proj", 256, 1024) | linear("blip.text_proj", 256, 768) | mlp("mlp.", 768)


CLIPS = {
    "openai/clip-vit-large-patch14": dict(
        vision=(1024, 24, 4096, 14, 257), text=(768, 12, 3072), joint=768, millions=428, heads=(16, 12)
    ),
    "openai/clip-vit-base-patch32": dict(
        vision=(768, 12, 3072, 32, 50), text=(512, 12, 2048), joint=512, millions=151, heads=(12, 8)
    ),
    "yuvalkirstain/PickScore_v1": dict(
        vision=(1280, 32, 5120, 14, 257), text=(1024, 24, 4096), joint=1024, millions=986, heads=(16, 16)
    ),
}  # fmt: skip
"""Width, layers, inner width (and patch, tokens) of both towers, the joint width, and millions of numbers."""


def clip_layer(at, width, inner):
    out = norm(f"{at}.layer_norm1", width) | norm(f"{at}.layer_norm2", width)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        out |= linear(f"{at}.self_attn.{name}", width, width)
    return out | linear(f"{at}.mlp.fc1", inner, width) | linear(f"{at}.mlp.fc2", width, inner)


def published_clip(vision, text, joint, **_):
    (wide, layers, inner, patch, tokens), (width, depth, hidden) = vision, text
    see, read = "vision_model", "text_model"
    out = {
        "logit_scale": (),
        "text_projection.weight": (joint, width),
        "visual_projection.weight": (joint, wide),
        f"{read}.embeddings.position_embedding.weight": (77, width),
        f"{read}.embeddings.position_ids": (1, 77),
        f"{read}.embeddings.token_embedding.weight": (49408, width),
        f"{see}.embeddings.class_embedding": (wide,),
        f"{see}.embeddings.patch_embedding.weight": (wide, 3, patch, patch),
        f"{see}.embeddings.position_embedding.weight": (tokens, wide),
        f"{see}.embeddings.position_ids": (1, tokens),
    }
    out |= norm(f"{see}.pre_layrnorm", wide) | norm(f"{see}.post_layernorm", wide)
    out |= norm(f"{read}.final_layer_norm", width)
    for i in range(layers):
        out |= clip_layer(f"{see}.encoder.layers.{i}", wide, inner)
    for i in range(depth):
        out |= clip_layer(f"{read}.encoder.layers.{i}", width, hidden)
    return out


def published_config(vision, text, joint, heads, **_):
    """What a config.json that holds the differences from the defaults says of these sizes."""
    names_ = ("hidden_size", "num_hidden_layers", "intermediate_size")
    see = dict(zip((*names_, "patch_size"), vision[:4], strict=True)) | {"num_attention_heads": heads[0]}
    read = dict(zip(names_, text, strict=True)) | {"num_attention_heads": heads[1]}
    return {"vision_config": see, "text_config": read, "projection_dim": joint}


def open_block(at, width, inner):
    out = norm(f"{at}.ln_1", width) | norm(f"{at}.ln_2", width)
    out |= {f"{at}.attn.in_proj_weight": (3 * width, width), f"{at}.attn.in_proj_bias": (3 * width,)}
    out |= linear(f"{at}.attn.out_proj", width, width)
    return out | linear(f"{at}.mlp.c_fc", inner, width) | linear(f"{at}.mlp.c_proj", width, inner)


def published_open_clip_h14():
    out = {
        "logit_scale": (),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.conv1.weight": (1280, 3, 14, 14),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
    }
    out |= norm("visual.ln_pre", 1280) | norm("visual.ln_post", 1280) | norm("ln_final", 1024)
    for i in range(32):
        out |= open_block(f"visual.transformer.resblocks.{i}", 1280, 5120)
    for i in range(24):
        out |= open_block(f"transformer.resblocks.{i}", 1024, 4096)
    return out


def placed(table, config, reader):
    """The keys that the table reads, all of them of the right shape; what is left must be on its list."""
    found = table.found(reader)
    places = list(tables.places(table, config))
    keys = {key for place in places for key in place.keys}
    tables.check_keys(table, keys, found, reader)
    for place in places:
        for key in place.keys:
            tables.check_shape(table, place, found[key], reader)
    return keys


def numbers(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_all_625_tensors_of_image_reward_are_read_or_on_the_list_of_unused_ones():
    shapes = published_image_reward()
    assert len(shapes) == 625
    reader = Split(Shapes(shapes), names.BLIP_FUSED)
    config = image_reward.config_of(reader, {})
    assert (config.vision.num_attention_heads, config.text.num_attention_heads) == (16, 12)
    assert (config.vision.image_size, config.vision.layer_norm_eps) == (224, 1e-6)
    assert (config.text.vocab_size, config.text.layer_norm_eps) == (30524, 1e-12)
    used = placed(names.IMAGE_REWARD, config, reader)
    head = placed(names.IMAGE_REWARD_HEAD, (768, 1024, 128, 64, 16, 1), Shapes(shapes))
    unused = {key for key in reader.keys() - used - head}
    assert unused == {
        "blip.text_encoder.embeddings.position_ids",
        *(f"blip.{part}_proj.{leaf}" for part in ("vision", "text") for leaf in ("weight", "bias")),
    }
    sizes = names.blip_shapes(config)
    assert round(numbers(sizes["visual_encoder"]) / 1e6, 1) == 303.3
    assert round(numbers(sizes["text_encoder"]) / 1e6, 1) == 142.0


@pytest.mark.parametrize("name", CLIPS)
def test_every_tensor_of_the_published_clips_finds_its_place(name):
    given = CLIPS[name]
    shapes = published_clip(**given)
    reader = Shapes(shapes)
    text, vision = read_clip(published_config(**given))
    assert vision.tokens == given["vision"][-1]
    used = placed(names.VISION, vision, reader) | placed(names.TEXT, text, reader)
    used |= placed(names.SCALE, None, reader)
    assert {key for key in reader.keys() - used if not key.endswith("position_ids")} == set()
    assert (
        round(sum(math.prod(s) for k, s in shapes.items() if not k.endswith("ids")) / 1e6)
        == given["millions"]
    )


def test_every_tensor_of_open_clip_h14_finds_its_place_and_its_heads_are_80_wide(monkeypatch):
    monkeypatch.setattr(clip_models, "open_tensors", lambda path: Shapes(published_open_clip_h14()))
    clip = clip_models.open_clip("HPS_v2.1_compressed.pt")
    assert clip.vision.hidden_size // clip.vision.num_attention_heads == 80
    assert clip.text.hidden_size // clip.text.num_attention_heads == 64
    assert (clip.vision.image_size, clip.vision.hidden_act, clip.text.hidden_act) == (224, "gelu", "gelu")
    used = placed(clip.vision_table, clip.vision, clip.reader) | placed(
        clip.text_table, clip.text, clip.reader
    )
    assert clip.reader.keys() - used == {"logit_scale"}


def test_the_published_aesthetic_head_finds_its_place():
    shapes = mlp("", 768)
    assert placed(names.AESTHETIC_HEAD, (768, 1024, 128, 64, 16, 1), Shapes(shapes)) == set(shapes)


@pytest.mark.parametrize(
    "key", ["blip.visual_encoder.norm.bias", "blip.text_encoder.encoder.layer.11.output.dense.weight"]
)
def test_a_missing_tensor_is_named(key):
    shapes = published_image_reward()
    del shapes[key]
    reader = Split(Shapes(shapes), names.BLIP_FUSED)
    with pytest.raises(UserError, match=f"published.pt: ImageReward lacks {re.escape(repr(key))}"):
        placed(names.IMAGE_REWARD, image_reward.config_of(reader, {}), reader)
