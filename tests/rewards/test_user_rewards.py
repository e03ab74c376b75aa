"""A user's function as a reward, and every mistake in it as one line."""

import os
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Prompt
from smart_grpo_jax.rewards import base, mixture, user

IMAGES = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
PROMPTS = [Prompt("one two", {"bonus": 1.0}), Prompt("three"), Prompt("a b c", {"bonus": 2.0})]
MODULE = """
    import time

    import jax.numpy as jnp
    import numpy as np

    from smart_grpo_jax import host_reward, reward


    @reward
    def redness(images, gain=1.0, whole: int = 1, flag=False):
        assert isinstance(whole, int) and isinstance(flag, bool)
        return gain * images[..., 0].mean((1, 2))


    def plain(images):
        return images.mean((1, 2, 3))


    def count_words(prompts):
        return np.array([len(prompt.split()) for prompt in prompts])


    @reward(prepare=count_words)
    def wordy(images, words, t):
        return words + images.mean((1, 2, 3)) * 0 + (10.0 if t is not None else 0.0)


    def ones_and_bonus(prompts):
        return np.ones(len(prompts)), np.array([p.metadata.get("bonus", 0) for p in prompts])


    @reward(prepare=ones_and_bonus)
    def two_arrays(images, ones, bonus):
        return ones + bonus


    @host_reward(batch=2, timeout=0.3, workers=3)
    def sharp(images, prompts, metadata, gain=1):
        assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 3) and len(images) <= 2
        return [None if not m else gain * float(i.std()) for i, m in zip(images, metadata)]


    @host_reward
    def broken(images, prompts, metadata):
        raise ValueError("no face")


    @host_reward(timeout=0.1)
    def slow(images, prompts, metadata):
        time.sleep(1)
        return [1.0] * len(images)


    @host_reward
    def short(images, prompts, metadata):
        return [1.0]


    @host_reward
    def images_only(images):
        return [1.0]


    @reward
    def pixels(images):
        return images.mean(-1)


    @reward
    def numpy_inside(images):
        return np.asarray(images).mean((1, 2, 3))


    @reward
    def branches(images):
        return images.mean((1, 2, 3)) if images.sum() > 0 else images.sum((1, 2, 3))


    @reward
    def wrong_name(images):
        return imagse.mean((1, 2, 3))


    @reward(prepare=lambda prompts: np.ones(2))
    def short_prepare(images, ones):
        return images.mean((1, 2, 3))


    @reward(prepare=lambda prompts: 1 / 0)
    def bad_prepare(images, ones):
        return images.mean((1, 2, 3))


    def as_host(images, prompts, metadata):
        return [1.0]


    number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """my_rewards.py in the working directory, as a user has it."""
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def score(name, images=IMAGES, **options):
    reward = base.build(name, **options)
    return jax.jit(reward.score)(reward.params, images, reward.prepare(PROMPTS[: len(images)]), None)


def test_three_lines_are_a_reward_in_the_graph():
    for name, want in (("redness", IMAGES[..., 0].mean((1, 2))), ("plain", IMAGES.mean((1, 2, 3)))):
        scores = score(f"my_rewards:{name}")
        np.testing.assert_allclose(scores.value, want, rtol=1e-5)  # order of a float32 sum
        assert scores.ok.all() and base.build(f"my_rewards:{name}").host is None


def test_options_of_the_config_are_arguments_and_numbers_of_the_command_line_fit_them():
    scores = score("red", kind="my_rewards:redness", gain=2, whole=3.0, flag=1.0)
    np.testing.assert_allclose(scores.value, 2 * IMAGES[..., 0].mean((1, 2)), rtol=1e-5)


def test_prompts_reach_a_jax_function_through_prepare():
    assert score("my_rewards:wordy").value.tolist() == [2.0, 1.0, 3.0]
    assert score("my_rewards:two_arrays").value.tolist() == [2.0, 1.0, 3.0]
    reward = base.build("my_rewards:wordy")
    assert reward.score({}, IMAGES, reward.prepare(PROMPTS), 0.5).value.tolist() == [12.0, 11.0, 13.0]


def test_a_value_that_is_no_number_is_missing():
    images = IMAGES.copy()
    images[1] = np.nan
    assert score("my_rewards:plain", images).ok.tolist() == [True, False, True]


def test_a_plain_python_function_sees_pixels_prompts_and_metadata():
    reward = base.build("my_rewards:sharp", gain=2.0)
    scores = reward.host(base.eight_bit(IMAGES), PROMPTS, ["a", "b", "c"])
    want = [2 * base.eight_bit(image).std() for image in IMAGES]
    np.testing.assert_allclose(scores.value, [want[0], np.nan, want[2]], rtol=1e-6)
    assert scores.errors == ("", "no score", "")
    values = base.load_reward("my_rewards:sharp")(IMAGES, PROMPTS)
    np.testing.assert_allclose(values * 2, scores.value, rtol=1e-6)


def test_a_decorator_sets_limits_and_the_config_sets_others_before_them(monkeypatch):
    seen = []
    monkeypatch.setattr(user.host, "scorer", lambda ask, limits, parts=(): seen.append(limits))
    base.build("my_rewards:sharp", limits=base.Host(batch=9, deadline=7.0), workers=1.0)
    assert seen == [base.Host(batch=2, timeout=0.3, workers=1, deadline=7.0)]


@pytest.mark.parametrize(
    "name, says",
    [
        ("broken", "ValueError: no face"),
        ("slow", "no answer within 0.1 s"),
        ("short", "got 1 scores for 3 images"),
    ],
)
def test_a_plain_function_that_fails_costs_its_scores_in_time(name, says):
    started = time.monotonic()
    scores = base.build(f"my_rewards:{name}").host(base.eight_bit(IMAGES), PROMPTS, ["a", "b", "c"])
    assert time.monotonic() - started < 0.8
    assert np.isnan(scores.value).all() and all(says in error for error in scores.errors)


def test_one_function_may_stand_in_a_mixture_twice():
    mixed = mixture.mixture(
        {
            "red": {"kind": "my_rewards:redness", "weight": 2.0},
            "my_rewards:redness": {"gain": 3.0, "weight": -1.0},
        }
    )
    scores = mixed.score(mixed.params, IMAGES, mixed.prepare(PROMPTS), None)
    assert set(scores.parts) == {"red", "my_rewards:redness"}
    np.testing.assert_allclose(scores.value, -IMAGES[..., 0].mean((1, 2)), rtol=1e-4)


def test_a_file_and_a_module_in_a_package_are_found_too(mine):
    (mine / "inner" / "deep").mkdir(parents=True)
    (mine / "inner" / "deep" / "mod.py").write_text("def flat(images):\n    return images.mean((1, 2, 3))\n")
    for where in ("inner.deep.mod:flat", "inner/deep/mod.py:flat", f"{mine}/inner/deep/mod.py:flat"):
        assert score(where).ok.all()
    assert os.getcwd() not in sys.path


@pytest.mark.parametrize(
    "where, says",
    [
        ("no_such_module:f", "no module no_such_module"),
        ("no/such.py:f", "no file no/such.py"),
        ("my_rewards:rednes", 'my_rewards has no "rednes" (try "redness")'),
        ("my_rewards:number", "is of type int, want a function"),
        ("my_rewards:images_only", "takes images, want a function of images, prompts, metadata"),
        ("my_rewards:as_host", "missing a required argument: 'prompts'"),
        ("raises:f", "raises failed on import: RuntimeError: too early"),
        ("raises.py:f", "raises.py failed on import: RuntimeError: too early"),
        ("spelling:f", "SyntaxError"),
        ("needs:f", "cannot be imported: No module named 'not_installed'"),
    ],
)
def test_a_reward_that_cannot_be_found_is_one_line_that_names_it(where, says, mine):
    (mine / "raises.py").write_text("raise RuntimeError('too early')\n")
    (mine / "spelling.py").write_text("def f(images:\n")
    (mine / "needs.py").write_text("import not_installed\n")
    with pytest.raises(UserError) as caught:
        base.build(where)
    assert says in str(caught.value) and where in caught.value.line and "\n" not in caught.value.line


@pytest.mark.parametrize(
    "name, says",
    [
        ("pixels", "gave shape (3, 8, 8) for 3 images, want a number each"),
        ("numpy_inside", "raised TracerArrayConversionError"),
        ("branches", "raised TracerBoolConversionError"),
        ("wrong_name", "raised NameError: name 'imagse' is not defined"),
        ("short_prepare", "prepare gave shape (2,) of float64 for 3 prompts"),
        ("bad_prepare", "prepare raised ZeroDivisionError"),
    ],
)
def test_a_mistake_inside_a_jax_function_is_one_line_that_names_it(name, says):
    with pytest.raises(UserError) as caught:
        score(f"my_rewards:{name}")
    assert says in str(caught.value) and f"my_rewards:{name}" in caught.value.line


def test_numpy_in_a_jax_function_is_told_of_the_other_decorator():
    with pytest.raises(UserError, match="else @host_reward"):
        score("my_rewards:numpy_inside")


def test_an_option_that_is_no_argument_is_refused():
    with pytest.raises(UserError, match=r'option "gian".*try "gain"'):
        base.build("my_rewards:redness", gian=2)
    with pytest.raises(UserError, match=r'option "workes".*try "workers"'):
        base.build("my_rewards:sharp", workes=2)
    with pytest.raises(UserError, match="it has no weights"):
        base.build("my_rewards:redness", path="x")


def test_a_mistake_is_told_under_the_entrys_own_name_too():
    with pytest.raises(UserError, match=r'red: reward my_rewards:nothing: .* has no "nothing"'):
        mixture.mixture({"red": {"kind": "my_rewards:nothing"}})


def test_a_decorated_function_can_be_tried_by_hand():
    redness = user.find("my_rewards:redness")
    np.testing.assert_allclose(redness(IMAGES, gain=2.0), 2 * IMAGES[..., 0].mean((1, 2)), rtol=1e-5)
    assert redness.__name__ == "redness"
    sharp = user.find("my_rewards:sharp")
    assert sharp(base.eight_bit(IMAGES[:1]), ["x"], [{}]) == [None]
