"""Every shipped config: it loads with all its words, and its docstring tells what is counted."""

import itertools
import runpy
from pathlib import Path

import pytest

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import recipes
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.main import run_file

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
PUBLISHED = ("sd35_medium", "sd35_large", "flux_dev")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_loads_and_its_docstring_answers_the_five_questions(path):
    configs.from_dict(run_file(str(path)))
    told = runpy.run_path(str(path))["__doc__"]
    for question in ("For  ", "Hardware", "Command", "Expect"):
        assert f"\n{question}" in told
    assert f"configs/{path.name}" in told


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_words_of_a_published_model_give_a_config(name):
    path = ROOT / "configs" / f"{name}.py"
    for method, side, weights in itertools.product(*recipes.WORDS.values()):
        config = configs.from_dict(run_file(f"{path}:{weights},{method},{side}"))
        assert (config.model.resolution, config.adapter.kind) == (int(side), weights)
        assert (config.search.rounds > 0) == (method == "smart_grpo")
        assert (config.prompts.groups, config.prompts.members, config.sampler.steps) == (48, 24, 10)
        assert (config.adapter.rank, config.adapter.alpha, config.sampler.noise_level) == (32, 64.0, 0.7)
    assert run_file(str(path)) == run_file(f"{path}:smart_grpo,512,lora")


@pytest.mark.parametrize(
    ("words", "match"),
    [("1023", r"1023.*try \"1024\""), ("lora,full", "full.*beside"), ("512,,512", "512.*beside")],
)
def test_words_that_are_unknown_or_contradict_are_one_line(words, match):
    with pytest.raises(UserError, match=match):
        run_file(f"{ROOT / 'configs' / 'sd35_medium.py'}:{words}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_of_a_config_is_what_is_counted(name):
    sizes = runpy.run_path(str(ROOT / "benchmarks" / "sizes.py"))
    path = ROOT / "configs" / f"{name}.py"
    found = sizes["count"](f"{path}:flow_grpo,1024")
    row = next(line for line in path.read_text().splitlines() if "flow_grpo,1024,lora" in line)
    told = row.replace(" + ", " ").replace("GB", " ").replace(",", "").split()[1:]
    wanted = [
        f"{found['trained'] / 1e6:.0f}", "M", f"{found['frozen_gb']:.1f}", f"{found['state_gb']:.1f}",
        f"{found['forward_tflop']:.2f}", str(found["velocity_calls"]), str(found["backward_calls"]),
        f"{found['epoch_pflop']:.0f}",
    ]  # fmt: skip
    assert told == wanted
