"""The world's learned rewards: what they know, and that their files are the published kind."""

import jax
import numpy as np
import pytest

from smart_grpo_jax import load_reward
from smart_grpo_jax.rewards import shapes_learned
from smart_grpo_jax.worlds.shapes import grammar, pairs

PAIRS = 256


@pytest.fixture(scope="module")
def drawn():
    made = jax.jit(pairs.draw, static_argnums=1)(jax.random.key(99), PAIRS)
    return made, grammar.texts(np.asarray(made.spec))


def test_the_better_of_two_pictures_is_seen(drawn):
    """The numbers of docs/world.md are .98 on renders; 256 other pairs have a standard error of .01."""
    made, prompts = drawn
    score = load_reward("shapes_image_reward")
    better, worse = score(made.better, prompts), score(made.worse, prompts)
    right = (better > worse)[np.asarray(made.valid)]
    assert right.mean() > 0.93
    assert np.isfinite(better).all()


def test_another_prompt_gets_another_score(drawn):
    made, prompts = drawn
    score = load_reward("shapes_image_reward")
    assert score(made.better, prompts).mean() > score(made.better, prompts[1:] + prompts[:1]).mean() + 1


def test_the_aesthetic_clip_has_learned_the_closed_form(drawn):
    made, prompts = drawn
    images = np.concatenate([made.better, made.worse])
    learned = load_reward("shapes_aesthetic_clip")(images, prompts * 2)
    exact = load_reward("shapes_aesthetic")(images, prompts * 2)
    assert np.corrcoef(learned, exact)[0, 1] > 0.8
    np.testing.assert_array_equal(learned, load_reward("shapes_aesthetic_clip")(images, [""] * len(images)))


@pytest.mark.torch
def test_torch_and_transformers_read_the_shipped_files():
    import torch
    from transformers import CLIPModel

    folder = shapes_learned.FOLDER
    state = torch.load(folder / "image_reward" / "ImageReward.pt", weights_only=True)
    assert state["blip.visual_encoder.blocks.0.attn.qkv.weight"].shape == (288, 96)
    head = torch.load(folder / "aesthetic" / "aesthetic-head.pth", weights_only=True)
    assert set(head) == {f"layers.{n}.{leaf}" for n in (0, 2, 4, 6, 7) for leaf in ("weight", "bias")}
    clip = CLIPModel.from_pretrained(folder / "aesthetic")
    assert clip.vision_model.embeddings.patch_embedding.weight.abs().sum() > 0
