"""Every line of every experiment of configs/paper is a valid config, and says only what it changes."""

import itertools
import runpy
from pathlib import Path

import pytest

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import experiments, schema
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.experiments import BASES, Arm, Experiment
from smart_grpo_jax.main import run_file

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "paper").glob("*.py"))
LINES = [
    (path, arm, size)
    for path in FILES
    for size in BASES
    for arm in runpy.run_path(str(path))["EXPERIMENT"].names(size)
]


def experiment(**changes):
    return Experiment(**({"question": "?", "against": "a", "arms": {"a": Arm(), "b": Arm()}} | changes))


@pytest.mark.parametrize("size", BASES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_of_an_experiment_is_a_valid_config(path, size):
    for arm in [arm for file, arm, there in LINES if file == path and there == size]:
        config = configs.from_dict(run_file(f"{path}:{arm},{size}"))
        assert (config.model.path == "shapes") == (size == "shapes")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_lines_of_an_experiment_differ(path):
    found = runpy.run_path(str(path))["EXPERIMENT"]
    for size in BASES:
        flat = {
            name: dict(schema.flatten(configs.to_dict(configs.from_dict(found.get_config(f"{name},{size}")))))
            for name in found.names(size)
        }
        for (one, a), (other, b) in itertools.combinations(flat.items(), 2):
            assert a != b, f"{path.stem}: {one} and {other} are the same config in size {size}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_of_an_experiment_answers_the_questions(path):
    told = runpy.run_path(str(path))["__doc__"]
    for question in ("For  ", "Hardware", "Command", "Expect"):
        assert f"\n{question}" in told
    assert f"configs/paper/{path.name}" in told


def test_words_choose_the_arm_and_the_size_and_default_to_what_is_compared_against():
    found = experiment(arms={"a": Arm(), "b": Arm({"search.rounds": 1, "search.elite": 0.5})}, against="b")
    assert found.words("") == ("b", "shapes") and found.words("sd35,a") == ("a", "sd35")
    assert found.get_config().search.rounds == 1
    with pytest.raises(UserError, match='"c"'):
        found.get_config("c")


def test_changes_go_from_common_over_size_to_arm_and_factors_multiply():
    found = experiment(
        common={"sampler.noise_level": 0.5},
        by_size={"shapes": {"sampler.noise_level": 0.6}},
        epochs={"shapes": 8},
        arms={"a": Arm(), "b": Arm({"sampler.noise_level": 0.8}, longer=1.5, faster=2)},
    )
    a, b, large = (found.get_config(words) for words in ("a", "b", "a,sd35"))
    assert (a.sampler.noise_level, b.sampler.noise_level, large.sampler.noise_level) == (0.6, 0.8, 0.5)
    assert (a.train.epochs, b.train.epochs, large.train.epochs) == (8, 12, 360)
    assert b.train.learning_rate == 2 * a.train.learning_rate


def test_a_table_of_rewards_is_replaced_whole():
    config = experiments.shapes()
    experiments.apply(config, {"eval_rewards": {"compressibility": 1.0}})
    assert configs.from_dict(config).eval_rewards == {"compressibility": 1.0}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: experiment(against="c"), "against"),
        (lambda: experiment(arms={"a": Arm(), "sd35": Arm()}), "sd35"),
        (lambda: experiment(common={"sampler.nose": 1}).get_config(), "sampler.nose"),
        (lambda: experiment(common={"sample.noise_level": 1}).get_config(), "sample.noise_level"),
        (lambda: experiment(arms={"a": Arm(sizes=("sd35",))}).get_config("a"), "size sd35"),
    ],
)
def test_a_mistake_in_an_experiment_is_one_line(make, match):
    with pytest.raises(UserError, match=match):
        make()
