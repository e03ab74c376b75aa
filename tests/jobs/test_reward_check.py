"""What `--mode=rewards --check` and the look before training say of good and of broken rewards."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from PIL import Image

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import RewardError, UserError
from smart_grpo_jax.core.types import Prompt, Scores, metadata_of
from smart_grpo_jax.jobs import reward_check, reward_examples
from smart_grpo_jax.rewards import base, mixture
from smart_grpo_jax.worlds.shapes import grammar

TEXTS = grammar.splits()["train"][::97]
CASES = sorted(file.parent.name for file in reward_examples.FIXTURES.glob("*/examples.json"))


def looked_at(score, uses_prompt=True):
    """The verdict on one in-graph reward `score(images, ctx)` with number rows as its prompts."""

    def whole(params, images, ctx, t=None):
        value = score(images, ctx["mine"])
        return Scores(value, jnp.isfinite(value), {"mine": value})

    prepare = lambda prompts: {"mine": jnp.asarray([len(p) for p in prompts]) if uses_prompt else ()}
    reward = base.Reward("mine", {}, prepare, whole, uses_prompt)
    images, prompts = reward_check.probes(32, 40, [f"a photo of {'x' * i}" for i in range(1, 9)])
    [verdict] = reward_check.quick({"mine": 1.0}, reward, images, prompts)
    return verdict


mean = lambda images: images.mean((1, 2, 3))

BROKEN = {
    "constant": lambda images, ctx: 0.5 * jnp.ones(len(images)),
    "deaf and blind": lambda images, ctx: ctx * 1.0,
    "prompt-blind": lambda images, ctx: mean(images),
    "NaN": lambda images, ctx: jnp.log(mean(images) - 0.5) + ctx,
}
STATES = {"deaf and blind": "constant"}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_reward_is_called_what_it_is_and_refused_in_one_line(kind):
    verdict = looked_at(BROKEN[kind])
    assert verdict.state == STATES.get(kind, kind)
    with pytest.raises(RewardError, match=f"rewards.mine: is {verdict.state} ") as caught:
        reward_check.refuse([verdict])
    assert "\n" not in caught.value.line and caught.value.exit_code == 5


def test_a_reward_that_does_its_work_is_not_refused():
    for score, listens in (
        (lambda images, ctx: mean(images) + 0.01 * ctx, True),
        (lambda images, ctx: mean(images), False),
        (lambda images, ctx: (mean(images) > 0.5).astype(jnp.float32), False),
        (lambda images, ctx: 1e6 + mean(images) * 10, False),
    ):
        verdict = looked_at(score, listens)
        assert verdict.state == "ok", verdict
        reward_check.refuse([verdict])


@pytest.mark.parametrize("size", [24, 64])
def test_the_rewards_of_the_package_pass_at_their_sizes(size):
    spec = {"compressibility": 1.0, "incompressibility": 0.5}
    texts = ["a dog", "a cat", "a house"]
    if size == 24:
        spec |= {
            "shapes_aesthetic": 0.1,
            "strict": {"weight": 1.0, "kind": "shapes", "strict": True},
        }
        texts = TEXTS
    images, prompts = reward_check.probes(size, size, texts)
    found = reward_check.quick(spec, mixture.mixture(spec), images, prompts)
    assert {v.reward: v.state for v in found} == dict.fromkeys(spec, "ok")


def test_training_begins_with_good_rewards_and_not_with_a_search_that_nothing_moves():
    config = small_config(shapes=1.0)
    reward = mixture.mixture(config.rewards)
    reward_check.before_training(config, reward, reward, TEXTS)
    searched = dataclasses.replace(config, search_reward={"nothing": 1.0})
    score = lambda params, images, ctx, t=None: Scores(
        jnp.zeros(len(images)), jnp.ones(len(images), bool), {"nothing": jnp.zeros(len(images))}
    )
    nothing = base.Reward("nothing", {}, lambda prompts: {"nothing": ()}, score, uses_prompt=False)
    with pytest.raises(RewardError, match=r"rewards.nothing: is constant \(0 for 8 different images"):
        reward_check.before_training(searched, reward, nothing, TEXTS)


def test_probes_keep_what_a_prompt_carries():
    given = [Prompt(f"a dog {i}", {"tag": i}) for i in range(3)]
    _, prompts = reward_check.probes(32, 32, [given[0], *given])
    assert [metadata_of(prompt)["tag"] for prompt in prompts] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_a_reward_that_is_only_logged_is_not_looked_at():
    spec = {"compressibility": 1.0, "incompressibility": 0.0}
    images, prompts = reward_check.probes(24, 24, TEXTS)
    found = reward_check.quick(spec, mixture.mixture(spec), images, prompts)
    assert [v.reward for v in found] == ["compressibility"]


def test_probes_differ_are_the_same_every_time_and_show_the_shapes_of_their_prompts():
    for height, width in ((24, 24), (32, 40), (64, 64)):
        images, prompts = reward_check.probes(height, width, TEXTS)
        assert images.shape == (8, height, width, 3) and len(prompts) == 8
        assert images.min() >= 0 and images.max() <= 1 and images.dtype == np.float32
        np.testing.assert_array_equal(images, reward_check.probes(height, width, TEXTS)[0])
        flat = images.reshape(8, -1)
        assert min(np.abs(flat[i] - flat[j]).mean() for i in range(8) for j in range(i)) > 0.01
    images, prompts = reward_check.probes(24, 24, TEXTS)
    strict = base.load_reward("shapes", strict=True)
    assert (strict(images, prompts) == 1).all() and (strict(images, [*prompts[1:], prompts[0]]) < 1).any()


def test_there_is_a_fixture_for_every_reward_with_published_weights():
    found = {reward_examples.read(reward_examples.FIXTURES / case / "examples.json").reward for case in CASES}
    assert found == {"image_reward", "aesthetic", "pick_score", "clip_score", "hps"}
    files = [file for file in reward_examples.FIXTURES.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1_000_000


@pytest.mark.parametrize("case", CASES)
def test_the_shipped_weights_give_the_scores_of_the_originals_code(case):
    name, _, state, detail = reward_check.fixture(reward_examples.FIXTURES / case / "examples.json")
    assert (name, state) == (case, "ok"), detail


@pytest.fixture
def moved(tmp_path):
    """The fixture of the aesthetic predictor, to be damaged."""
    shutil.copytree(reward_examples.FIXTURES, tmp_path / "fixtures")
    return tmp_path / "fixtures" / "aesthetic" / "examples.json"


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    return file


def test_a_stored_score_that_is_not_met_is_off_and_the_worst_is_shown(moved):
    edit(moved, lambda data: data["examples"][2].update(score=data["examples"][2]["score"] + 2e-5))
    _, _, state, detail = reward_check.fixture(moved)
    assert state == "off" and "2.png" in detail
    edit(moved, lambda data: data["examples"][2].update(tolerance=1e-3))
    assert reward_check.fixture(moved)[2] == "ok"


BAD_FILES = {
    "no JSON": (lambda f: f.write_text("{"), "cannot be read as JSON"),
    "a list": (lambda f: f.write_text("[]"), 'wanted {"reward": NAME'),
    "no examples": (lambda f: edit(f, lambda d: d.update(examples=[])), 'wanted {"reward": NAME'),
    "unknown field": (lambda f: edit(f, lambda d: d.update(scores=[])), "got 'scores'"),
    "unknown reward": (lambda f: edit(f, lambda d: d.update(reward="beauty")), 'got "beauty"'),
    "no tolerance": (lambda f: edit(f, lambda d: d.pop("tolerance")), r"examples\[0\]: tolerance: got None"),
    "score is text": (lambda f: edit(f, lambda d: d["examples"][1].update(score="5")), r"\[1\]: score: got"),
    "no prompt": (lambda f: edit(f, lambda d: d["examples"][0].pop("prompt")), "wanted image, prompt"),
    "no image": (lambda f: edit(f, lambda d: d["examples"][0].update(image="x.png")), "no image .*x.png"),
    "no picture": (lambda f: edit(f, lambda d: d["examples"][0].update(image="config.json")), "as an image"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_of_examples_is_one_line(what, moved):
    change, message = BAD_FILES[what]
    change(moved)
    with pytest.raises(UserError, match=message):
        found = reward_examples.read(moved)
        reward_examples.scores(lambda images, prompts: np.zeros(len(images)), found.examples)


def test_images_of_several_sizes_keep_their_order(tmp_path):
    for i, size in enumerate([(8, 6), (4, 4), (8, 6)]):
        Image.new("RGB", size, (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [reward_examples.Example(tmp_path / f"{i}.png", "", 0.0, 1.0) for i in range(3)]
    red = lambda images, prompts: images[..., 0].mean((1, 2)) * 255
    np.testing.assert_allclose(reward_examples.scores(red, rows), [0, 10, 20], rtol=1e-6)


def small_config(**rewards):
    """A run of the shapes world."""
    config = configs.Config(rewards=rewards or {"shapes": 1.0}, eval_rewards={})
    model = dataclasses.replace(config.model, path=str(tiny_run.SHIPPED))
    return dataclasses.replace(config, model=model)


@pytest.fixture
def few_fixtures(monkeypatch, tmp_path):
    """One of the package's fixtures is enough where the fixtures are not the point."""
    for name in ("images", "aesthetic"):
        shutil.copytree(reward_examples.FIXTURES / name, tmp_path / "few" / name)
    monkeypatch.setattr(reward_examples, "FIXTURES", tmp_path / "few")


def weights(case="aesthetic"):
    return str(reward_examples.FIXTURES / case)


@pytest.mark.usefixtures("few_fixtures")
def test_check_prints_a_table_with_fixtures_probes_and_the_drift_of_bfloat16(capsys):
    config = small_config(shapes=1.0, aesthetic={"weight": 0.5, "path": weights()})
    reward_check.job(config, "")
    printed = capsys.readouterr().out
    assert "4 scores of the original's code" in printed and "8 probes" in printed
    assert "drifts by" in printed and "% of the spread" in printed and "off" not in printed


@pytest.mark.usefixtures("few_fixtures")
def test_check_ends_with_5_where_a_user_s_published_scores_are_not_met(capsys, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(weights(), mine)
    shutil.copytree(reward_examples.FIXTURES / "images", tmp_path / "images")
    wrong = lambda data: (data.pop("weights"), data["examples"][0].update(score=3.0))
    edit(mine / "examples.json", wrong)
    config = small_config(aesthetic={"weight": 1.0, "path": str(mine)})
    with pytest.raises(RewardError, match="rewards: aesthetic is off") as caught:
        reward_check.job(config, "")
    assert caught.value.exit_code == 5 and "stored 3 ±" in capsys.readouterr().out
    with pytest.raises(UserError, match="got 'aesthetic', wanted one of the run's own"):
        reward_check.job(small_config(), "", str(mine / "examples.json"))


@pytest.mark.usefixtures("few_fixtures")
def test_check_ends_with_5_where_a_configured_reward_is_blind(monkeypatch):
    def build(path=None, dtype="float32"):
        score = lambda params, images, ctx, t=None: Scores(mean(images), jnp.ones(len(images), bool), {})
        return base.Reward("shapes", {}, grammar.encode, score, uses_prompt=True)

    original = base.builder
    monkeypatch.setattr(base, "builder", lambda name: build if name == "shapes" else original(name))
    with pytest.raises(RewardError, match="shapes is prompt-blind"):
        reward_check.job(small_config(), "")


HOST_REWARDS = """
from smart_grpo_jax import host_reward

@host_reward(batch=8, timeout=10, workers=1)
def nothing_found(images, prompts, metadata):
    return [0.0] * len(images)

@host_reward(batch=8, timeout=10, workers=1)
def broken(images, prompts, metadata):
    raise ValueError("no such detector")
"""


@pytest.mark.usefixtures("few_fixtures")
def test_a_host_function_must_answer_but_may_say_zero(monkeypatch, tmp_path, capsys):
    (tmp_path / "checked_host_rewards.py").write_text(HOST_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    reward_check.job(small_config(**{"checked_host_rewards:nothing_found": 1.0}), "")
    assert "0 … 0" in capsys.readouterr().out
    with pytest.raises(RewardError, match="checked_host_rewards:broken is failed"):
        reward_check.job(small_config(**{"checked_host_rewards:broken": 1.0}), "")
    assert "no such detector" in capsys.readouterr().out


def test_a_look_compiles_one_program():
    spec = {"shapes": 1.0}
    reward = mixture.mixture(spec)
    images, prompts = reward_check.probes(24, 24, TEXTS)
    count = 0
    original = reward.score

    def counted(*arguments):
        nonlocal count
        count += 1
        return original(*arguments)

    reward_check.quick(spec, dataclasses.replace(reward, score=counted), images, prompts)
    assert count == 1
