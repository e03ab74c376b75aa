import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models.blip import BertConfig, ViTConfig
from smart_grpo_jax.models.clip_vision import CLIPVisionConfig, read_clip


def test_an_empty_config_is_the_published_default():
    text, vision = read_clip({})
    assert (vision.hidden_size, vision.patch_size, vision.tokens, vision.hidden_act) == (
        768,
        32,
        50,
        "quick_gelu",
    )
    assert (text.hidden_size, text.num_hidden_layers, text.hidden_act) == (512, 12, "quick_gelu")
    assert vision.projection_dim == text.projection_dim == 512


def test_the_width_of_the_projection_is_the_whole_model_s():
    text, vision = read_clip(
        {"projection_dim": 768, "vision_config": {"projection_dim": 512}, "text_config": {}}
    )
    assert vision.projection_dim == text.projection_dim == 768


def test_the_older_name_of_a_part_goes_before_the_newer_one():
    data = {"vision_config": {"hidden_size": 1536}, "vision_config_dict": {"patch_size": 14}}
    _, vision = read_clip(data)
    assert (vision.hidden_size, vision.patch_size) == (768, 14)
    _, vision = read_clip(data | {"vision_config_dict": None})
    assert (vision.hidden_size, vision.patch_size) == (1536, 32)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"hidden_act": "silu"}, r"hidden_act: got 'silu'"),
        ({"num_attention_heads": 7}, r"num_attention_heads: got 7, wanted a divisor of 768"),
        ({"num_registers": 4}, r"unknown feature num_registers = 4"),
    ],
)
def test_what_is_not_built_is_refused_by_name(given, message):
    with pytest.raises(UserError, match=message):
        read_clip({"vision_config": given})


def test_a_head_may_have_any_width_that_divides():
    assert CLIPVisionConfig(hidden_size=1280, num_attention_heads=16).tokens == 50
    for config in (ViTConfig, BertConfig):
        with pytest.raises(UserError, match="got 5 heads, wanted a divisor of the width 24"):
            config(hidden_size=24, num_attention_heads=5)
        with pytest.raises(UserError, match="got 0 heads"):
            config(hidden_size=24, num_attention_heads=0)
