import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Scores
from smart_grpo_jax.rewards import base, mixture

PROMPTS = ["a photo of a red circle", "a photo of a cross"]
IMAGES = np.random.default_rng(0).random((2, 24, 24, 3), np.float32)


@pytest.mark.parametrize("name", ["shapes", "shapes_aesthetic", "compressibility", "incompressibility"])
def test_a_reward_without_weights_scores_in_a_graph(name):
    reward = base.build(name)
    ctx = reward.prepare(PROMPTS)
    assert all(leaf.shape[0] == len(PROMPTS) for leaf in jax.tree.leaves(ctx))
    assert bool(jax.tree.leaves(ctx)) == reward.uses_prompt
    scores = jax.jit(reward.score)(reward.params, IMAGES, ctx)
    assert scores.value.dtype == jnp.float32 and scores.value.shape == (2,) and scores.ok.all()
    assert all(part.shape == (2,) for part in scores.parts.values())


def test_every_row_of_the_table_leads_to_a_builder():
    for name, where in base.REWARDS.items():
        module, function = where.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_an_unknown_reward_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r'eval_rewards: got "shape".*try "shapes"'):
        base.known("shape", "eval_rewards")
    with pytest.raises(UserError, match=r'"compressibilty".*try "compressibility"'):
        base.build("compressibilty")


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match=r'option "qualty".*try "quality"'):
        base.build("compressibility", qualty=3)
    with pytest.raises(UserError, match="it has none"):
        base.build("shapes_aesthetic", strict=True)


def test_a_path_for_a_reward_without_weights_is_refused():
    with pytest.raises(UserError, match="it has no weights"):
        base.build("shapes", path="weights.safetensors")


def test_a_loaded_reward_is_a_function_of_images_and_prompts():
    values = base.load_reward("compressibility")(IMAGES, PROMPTS)
    assert isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == (2,)


def test_a_loaded_reward_answers_nan_where_it_failed():
    images = IMAGES.copy()
    images[1] = np.nan
    values = base.load_reward("compressibility")(images, PROMPTS)
    assert np.isfinite(values[0]) and np.isnan(values[1])


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (IMAGES[0], PROMPTS, "images of shape"),
        (IMAGES, PROMPTS[:1], "1 prompts for 2 images"),
        (IMAGES, "a photo of a cross", "one text for 2 images"),
    ],
)
def test_images_and_prompts_must_fit_each_other(images, prompts, message):
    with pytest.raises(UserError, match=message):
        base.load_reward("compressibility")(images, prompts)


def test_an_own_reward_is_one_row_of_the_table(monkeypatch):
    monkeypatch.setitem(base.REWARDS, "redness", f"{__name__}:build_redness")
    values = base.load_reward("redness", gain=2.0)(IMAGES, PROMPTS)
    np.testing.assert_allclose(values, 2 * IMAGES[..., 0].mean((1, 2)), rtol=1e-5)  # float32 sums


def build_redness(path=None, dtype="float32", gain=1.0, broken=False):
    def score(params, images, ctx, t=None):
        value = params["gain"] * images[..., 0].mean((1, 2))
        ok = jnp.arange(images.shape[0]) != (0 if broken else -1)
        return Scores(jnp.where(ok, value, jnp.nan), ok, {"half": value / 2})

    return base.Reward("redness", {"gain": jnp.float32(gain)}, base.no_prompt, score, uses_prompt=False)


@pytest.fixture
def redness(monkeypatch):
    find = base.builder
    monkeypatch.setattr(base, "builder", lambda name: build_redness if name == "redness" else find(name))


def scored(spec):
    reward = mixture.mixture(spec)
    return reward, jax.jit(reward.score)(reward.params, IMAGES, reward.prepare(PROMPTS))


def test_a_mixture_is_the_weighted_sum_and_shows_its_parts(redness):
    reward, scores = scored({"compressibility": 100.0, "redness": {"weight": -2.0, "gain": 3.0}})
    assert set(scores.parts) == {"compressibility", "compressibility/kilobytes", "redness", "redness/half"}
    want = 100 * scores.parts["compressibility"] - 2 * scores.parts["redness"]
    np.testing.assert_allclose(scores.value, want, rtol=1e-6)  # one float32 rounding
    np.testing.assert_allclose(scores.parts["redness"], 3 * IMAGES[..., 0].mean((1, 2)), rtol=1e-5)
    assert reward.params["redness"]["gain"] == 3.0 and not reward.uses_prompt and not reward.host


def test_a_failed_summand_makes_the_whole_missing_and_never_zero(redness):
    scores = scored({"compressibility": 1.0, "redness": {"weight": 1.0, "broken": True}})[1]
    assert scores.ok.tolist() == [False, True]
    assert np.isnan(scores.value[0]) and np.isfinite(scores.value[1])
    assert np.isfinite(scores.parts["compressibility"]).all()


def test_a_summand_of_weight_zero_is_logged_and_cannot_fail_the_rest(redness):
    scores = scored({"compressibility": 1.0, "redness": {"weight": 0, "broken": True}})[1]
    assert scores.ok.all() and np.isnan(scores.parts["redness"][0])
    np.testing.assert_array_equal(scores.value, scores.parts["compressibility"])


def test_a_table_without_a_weight_weighs_one():
    assert schema.weight_of({"quality": 50}) == 1.0
    assert schema.weight_of(2) == 2.0
    assert mixture.options_of({"weight": 2, "quality": 50}) == {"quality": 50}


@pytest.mark.parametrize("spec", [{}, {"shapes": 0.0}])
def test_a_mixture_of_nothing_is_refused(spec):
    with pytest.raises(UserError, match="at least one reward"):
        mixture.mixture(spec)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", True, None])
def test_a_weight_must_be_a_finite_number(weight):
    with pytest.raises(UserError, match="want a finite number"):
        mixture.mixture({"shapes": weight})
