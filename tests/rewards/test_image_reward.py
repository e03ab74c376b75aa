"""ImageReward against PyTorch, on a tiny random checkpoint in the published layout."""

import jax
import numpy as np
import pytest
import tiny_rewards as tiny

from smart_grpo_jax import load_reward
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models.blip import Bert, ViT
from smart_grpo_jax.rewards import base, image_reward
from smart_grpo_jax.rewards.preprocess import PIPELINES
from smart_grpo_jax.runtime.compile_cache import CompileCount

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch").set_num_threads(1)
    return tiny.ImageRewardOracle()


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    return oracle.write(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(scope="module")
def reward(folder):
    return base.build("image_reward", str(folder), vision_heads=3)


@pytest.fixture(scope="module")
def scored(folder):
    return load_reward("image_reward", str(folder), vision_heads=3)


@pytest.mark.parametrize("size", tiny.SIZES)
def test_scores_are_those_of_pytorch(size, oracle, scored):
    images = tiny.batch(*size)
    *_, single = oracle.parts(images, tiny.PROMPTS)
    *_, double = oracle.parts(images, tiny.PROMPTS, double=True)
    tiny.assert_parity(scored(images, tiny.PROMPTS), single, double)


def test_image_tokens_and_text_states_are_those_of_pytorch(oracle, reward, folder):
    images = tiny.batch(64, 71)
    single, double = (oracle.parts(images, tiny.PROMPTS, double=kind) for kind in (False, True))
    config = image_reward.load(folder / image_reward.FILE, np.float32, vision_heads=3).config
    ctx, params = reward.prepare(tiny.PROMPTS), reward.params["blip"]
    pixels = PIPELINES["image_reward"](images, config.vision.image_size)
    seen = ViT(config.vision, np.float32).apply({"params": params["visual_encoder"]}, pixels)
    tiny.assert_parity(seen, single[0], double[0])
    states = Bert(config.text, np.float32).apply(
        {"params": params["text_encoder"]}, ctx["ids"], ctx["mask"], seen
    )
    tiny.assert_parity(states, single[1], double[1])


def test_images_of_one_prompt_are_ranked_as_pytorch_ranks_them(oracle, scored):
    images = np.concatenate([tiny.pictures(64, 64, seed=seed) for seed in range(6)])
    prompts = [tiny.PROMPTS[0]] * len(images)
    *_, double = oracle.parts(images, prompts, double=True)
    ours = scored(images, prompts)
    assert np.diff(np.sort(double)).min() > 1e-5  # no ties that rounding could turn round
    assert list(np.argsort(ours)) == list(np.argsort(double))


def test_words_beyond_the_35th_piece_do_not_count(scored):
    image = tiny.pictures(64, 64, 1)
    first = "a " * 33
    assert scored(image, [first]) == scored(image, [first + "green dog"])
    assert scored(image, ["a " * 32]) != scored(image, ["a " * 32 + "green dog"])


def test_folded_and_layered_heads_agree(scored, folder):
    images = tiny.batch(64, 64)
    layered = load_reward("image_reward", str(folder), vision_heads=3, folded=False)
    # float32 through five layers, whose inner values are some ten times the score
    np.testing.assert_allclose(layered(images, tiny.PROMPTS), scored(images, tiny.PROMPTS), atol=1e-5)


def test_bfloat16_drifts_little_against_the_spread_of_the_images(scored, folder):
    images = np.concatenate([tiny.pictures(64, 64, seed=seed) for seed in range(6)])
    prompts = [tiny.PROMPTS[0]] * len(images)
    reward = base.build("image_reward", str(folder), "bfloat16", vision_heads=3)
    assert {str(a.dtype) for a in jax.tree.leaves(reward.params["blip"])} == {"bfloat16"}
    assert {str(a.dtype) for a in jax.tree.leaves(reward.params["head"])} == {"float32"}
    full = scored(images, prompts)
    narrow = load_reward("image_reward", str(folder), "bfloat16", vision_heads=3)(images, prompts)
    drift = np.sqrt(np.mean((narrow - full) ** 2)) / full.std()
    assert 0 < drift < 0.1, drift


def test_repeated_calls_compile_once(folder):
    call = load_reward("image_reward", str(folder), vision_heads=3)
    images = tiny.batch(64, 64)
    call(images, tiny.PROMPTS)
    count = CompileCount()
    for seed in (1, 2):
        call(tiny.pictures(64, 64, seed=seed)[[0, 1, 2, 3, 0, 1]], tiny.PROMPTS[::-1])
    assert count.total == 0


def test_the_same_tensors_as_safetensors_give_the_same_parameters(oracle, folder, tmp_path):
    from safetensors.torch import save_file

    save_file(oracle.state(), tmp_path / "model.safetensors")
    tiny.write_bert_vocabulary(tmp_path)
    (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
    one, other = (
        base.build("image_reward", str(p), vision_heads=3).params
        for p in (folder, tmp_path / "model.safetensors")
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_file_that_lacks_a_used_tensor_is_refused_by_name(oracle, folder, tmp_path):
    state = oracle.state()
    gone = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    del state[gone]
    oracle.torch.save(state, tmp_path / "ImageReward.pt")
    tiny.write_bert_vocabulary(tmp_path)
    with pytest.raises(UserError, match=f"lacks '{gone}'"):
        base.build("image_reward", str(tmp_path), vision_heads=3, text_heads=4)


def test_a_tensor_that_nobody_knows_is_refused_by_name(oracle, tmp_path):
    state = oracle.state() | {"blip.visual_encoder.blocks.0.ls1.gamma": oracle.torch.zeros(24)}
    oracle.torch.save(state, tmp_path / "ImageReward.pt")
    tiny.write_bert_vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"knows no 'blip.visual_encoder.blocks.0.ls1.gamma'"):
        base.build("image_reward", str(tmp_path), vision_heads=3, text_heads=4)
