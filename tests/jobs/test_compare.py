"""`--mode=compare` on run folders of a known law."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import (
    compare,
    compare_page,
    compare_reference,
    compare_runs,
    compare_settings,
    compare_statistics,
    statistics,
)
from tests.jobs.made_runs import arm, made

ROOT = Path(__file__).resolve().parents[2]
PRICE = compare_runs.UNWEIGHTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three arms of five seeds: a gain of .10; of .20 at the same price; of .20 at three times the price."""
    root = tmp_path_factory.mktemp("arms")
    arm(root, "plain", gain=0.1)
    arm(root, "better", gain=0.2)
    arm(root, "dear", gain=0.2, price=300)
    return root


@pytest.fixture(scope="module")
def result(folder):
    arms = compare_runs.load([str(folder / name / "seed*") for name in ("plain", "better", "dear")])
    return compare.compare(arms, "plain", PRICE, "here")


def row(result, name, axis, share=1.0, score="shapes"):
    found = [
        r
        for r in result["comparisons"]
        if (r["arm"], r["axis"], r["share"], r["score"]) == (name, axis, share, score)
    ]
    assert len(found) == 1
    return found[0]


def test_an_arm_that_is_better_is_found_with_its_effect_inside_the_interval(result):
    found = row(result, "better", "cost")
    assert found["verdict"] == "better" and found["low"] <= 0.1 <= found["high"]
    assert found["seeds"] == [5, 5] and found["paired"] and found["prompts"] == 40


def test_at_equal_cost_a_dear_arm_is_read_where_it_has_paid_as_much(result):
    # 4 epochs of plain cost 4 (100 + 2 10) = 480, dear pays 320 an epoch: it is read at epoch 1.5
    assert row(result, "dear", "epoch")["verdict"] == "better"
    found = row(result, "dear", "cost")
    assert found["at"] == pytest.approx(480)
    assert found["mean"] == pytest.approx(0.45 + 0.2 * 1.5 / 4, abs=0.02)
    assert found["difference"] == pytest.approx(-0.025, abs=0.015)


def test_compilation_is_left_out_of_the_time(result):
    assert row(result, "better", "seconds")["at"] == pytest.approx(4 * 2.0)


def test_a_quarter_and_a_half_of_the_common_way_are_compared_too(result):
    assert [row(result, "better", "epoch", share)["at"] for share in (0.25, 0.5, 1.0)] == [1, 2, 4]
    assert row(result, "better", "epoch", 0.5)["difference"] == pytest.approx(0.05, abs=0.02)


def test_equal_arms_show_no_difference(tmp_path):
    arm(tmp_path, "one", gain=0.1)
    arm(tmp_path, "other", seeds=range(10, 15), gain=0.1)
    found = compare.compare(compare_runs.load([f"{tmp_path}/*/seed*"]), None, PRICE, "")
    assert row(found, "other", "end")["verdict"] == "open" and not row(found, "other", "end")["paired"]
    assert "Nothing is shown" in compare_page.headline(found)


def test_a_judge_that_is_gamed_is_told_apart(tmp_path):
    arm(tmp_path, "honest", gain=0.2)
    arm(tmp_path, "gaming", gain=0.2, judge_gain=-0.2)
    arms = compare_runs.load([f"{tmp_path}/honest/*", f"{tmp_path}/gaming/*"])
    found = compare.compare(arms, "honest", PRICE, "")
    assert [(s["name"], s["trained_on"]) for s in found["scores"]] == [
        ("shapes", True),
        ("second/graded", False),
    ]
    assert row(found, "gaming", "end")["verdict"] == "open"
    assert row(found, "gaming", "end", score="second/graded")["verdict"] == "worse"


def test_several_images_of_an_untrained_prompt_are_also_the_best_of_them(tmp_path):
    made(tmp_path / "base", epochs=(0,), images=8)
    made(tmp_path / "tuned" / "seed0", seed=0)
    made(tmp_path / "tuned" / "seed1", seed=1)
    arms = compare_runs.load([str(tmp_path / "base"), f"{tmp_path}/tuned/*"])
    names = ["base", *(f"base_best_of_{n}" for n in (2, 4, 8))]
    assert [a.name for a in arms] == [*names, "tuned"]
    rewards = [arms[i].last("shapes").mean() for i in range(4)]
    assert rewards == sorted(rewards) and rewards[3] > rewards[0] + 0.05
    found = compare.compare(arms, "base", PRICE, "")
    assert {r["axis"] for r in found["comparisons"]} == {"end"}
    assert row(found, "base_best_of_8", "end")["verdict"] == "better"


def test_the_best_of_a_lot_brings_its_other_scores_and_every_lot_counts():
    reward = np.array([[0.1, 0.9, np.nan, 0.4, 0.2], [0.5, 0.5, 0.6, 0.3, 0.9]])
    judge = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]])
    found = compare_runs.best({"reward": reward, "judge": judge}, count=2)
    np.testing.assert_allclose(found["judge"], [(2 + 4) / 2, (6 + 8) / 2])  # the fifth makes no lot
    np.testing.assert_allclose(found["reward"], [0.65, 0.55])
    np.testing.assert_allclose(compare_runs.best({"reward": reward}, count=5)["reward"], [0.9, 0.9])


def test_a_results_file_says_the_same_as_the_folders(folder, tmp_path, result):
    arms = compare_runs.load([str(folder / name / "seed*") for name in ("plain", "better", "dear")])
    compare.write_results(tmp_path / "some.jsonl", arms)
    again = compare.compare(compare_runs.load([str(tmp_path / "some.jsonl")]), "plain", PRICE, "here")
    for one, other in zip(result["comparisons"], again["comparisons"], strict=True):
        assert one["verdict"] == other["verdict"]
        assert one["difference"] == pytest.approx(other["difference"], abs=2 * 10.0**-compare_runs.DIGITS)
    assert (tmp_path / "some.jsonl").stat().st_size < 15 * 5000
    assert again["arms"][0]["calls"] == result["arms"][0]["calls"]


@pytest.mark.parametrize("size", [3000.0, 5.0, 0.4, 0.03, 1.5e-3, 2e-7])
def test_a_results_file_keeps_four_digits_of_small_scores(size):
    """Compressibility of a small picture is -0.0015: in units of 0.0001 nothing would be left of a gain."""
    scores = np.append(-size * np.linspace(0.5, 1, 50), np.nan)
    again = compare_runs._scores(compare_runs._packed(scores))
    np.testing.assert_allclose(again, scores, rtol=0, atol=min(1e-4, 1e-3 * size))


def test_small_differences_are_told_with_the_digits_that_they_have():
    row = dict(difference=-3.29e-6, low=-4.78e-5, high=4.1e-5)
    assert compare_statistics.told(row) == "-0.000003 [-0.000048, +0.000041]"
    row = dict(difference=0.0312, low=0.0101, high=0.0523)
    assert compare_statistics.told(row) == "+0.031 [+0.010, +0.052]"
    assert " ".join(map(statistics.shown, (0.5312, -0.001547, 0.0, 6.8))) == "0.531 -0.0015 0.000 6.800"


def test_the_command_writes_a_page_and_a_json(folder, tmp_path, capsys):
    runs = [str(folder / name / "seed*") for name in ("plain", "better")]
    assert entry.main(["--mode=compare", *runs, f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "better" in said and "at equal cost" in said
    page = (tmp_path / "compare.html").read_text()
    assert "Better than plain in graded at equal cost: better" in page
    assert "<script" not in page and not re.search(r'(src|href)="http', page)
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["against"] == "plain" and len(stored["arms"]) == 2


def test_measured_costs_weigh_the_calls(folder, tmp_path):
    file = tmp_path / "costs.json"
    table = {"velocity": 0.002, "backward": 0.006, "decode": 0.001, "reward": 0.001, "machine": "m"}
    file.write_text(json.dumps(table))
    price, origin = compare.prices(str(file), [])
    assert price == {"velocity": 1.0, "backward": 3.0, "decode": 0.5, "reward": 0.5} and "m" in origin
    assert compare.prices(None, [str(tmp_path / "a" / "seed0")])[0] == price
    file.write_text("{}")
    with pytest.raises(UserError, match="costs"):
        compare.prices(str(file), [])


def wrong(folder, text):
    made(folder / "broken" / "seed0", seed=0)
    (folder / "broken" / "file.jsonl").write_text(text)
    return [str(folder / "broken" / "file.jsonl")]


MISTAKES = {
    "nothing": (lambda f: [], "no runs"),
    "no such folder": (lambda f: [str(f / "none")], "no run"),
    "a seed twice": (
        lambda f: [str(made(f / "b" / "a" / "s1", seed=1)), str(made(f / "c" / "a" / "s1", seed=1))],
        "each once",
    ),
    "two configs in an arm": (
        lambda f: [
            str(made(f / "a" / "s0", seed=0)),
            str(made(f / "a" / "s1", seed=1, change={"sampler.noise_level": 0.5})),
        ],
        "noise_level",
    ),
    "other prompts": (lambda f: [str(made(f / "a")), str(made(f / "b", prompts=30))], "other prompts"),
    "an arm that is not there": (lambda f: [str(made(f / "a")), "--against=c"], "--against"),
    "no results file": (lambda f: wrong(f, "x"), "no results file"),
    "half a results file": (lambda f: wrong(f, '{"arm": "a"}'), "no results file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, capsys):
    make, says = MISTAKES[name]
    assert entry.main(["--mode=compare", f"--out={tmp_path / 'out'}", *make(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/smart/seed3", "smart"), ("x/smart/3", "smart"), ("x/smart-s3", "smart"), ("x/k4n2", "k4n2")],
)
def test_the_name_of_an_arm_is_the_folder_without_the_seed(path, name, tmp_path):
    assert compare_runs.arm_name(tmp_path / path) == name


def test_settings_that_are_told_are_those_that_are_not_the_defaults():
    plain = configs.to_dict(configs.from_dict(configs.default()))
    assert compare_settings.changed(plain) == {} == compare_settings.changed({})
    other = json.loads(json.dumps(plain))
    other["search"]["candidates"], other["seed"] = 7, 3
    other["rewards"] = {"shapes_aesthetic": 2.0}
    found = {"search.candidates": 7, "rewards.shapes": None, "rewards.shapes_aesthetic": 2.0}
    assert compare_settings.changed(other) == found
    assert compare_settings.changed(dict(other, rewards={"shapes": 1.0, "shapes_aesthetic": 2.0})) != found
    for config in (plain, other, dict(plain, rewards={"shapes": 1.0, "compressibility": 0.5})):
        nested = compare_runs._nested(compare_settings.stored(config))
        assert compare_settings.filled(nested) == compare_settings.filled(config)


def test_a_run_of_the_same_law_is_inside_the_expected_band_and_another_is_not(tmp_path, capsys):
    arm(tmp_path, "shipped", gain=0.15, spread=0.02)
    file = tmp_path / "expected" / "shipped.json"
    assert entry.main(["--mode=compare", f"{tmp_path}/shipped/*", f"--expect={file}"]) == 0
    stored = json.loads(file.read_text())
    assert stored["seeds"] == [0, 1, 2, 3, 4] and stored["epochs"] == [0, 2, 4]
    assert set(stored["scores"]) == {"shapes", "second/graded"}
    capsys.readouterr()
    made(tmp_path / "mine", seed=17, gain=0.15, spread=0.02)
    assert entry.main(["--mode=compare", str(tmp_path / "mine"), f"--reference={file}"]) == 0
    said = capsys.readouterr().out
    assert said.count("is inside") == 2 and "OUTSIDE" not in said and "differ" not in said
    made(tmp_path / "bad", seed=17, gain=0.0, spread=0.02, change={"train.clip": 0.3})
    assert entry.main(["--mode=compare", str(tmp_path / "bad"), f"--reference={file}"]) == 0
    said = capsys.readouterr().out
    assert said.count("OUTSIDE") == 2 and "settings differ from the expected run's: train.clip" in said


def test_the_shipped_bands_are_of_the_shipped_configs():
    for path in (ROOT / "configs" / "expected").glob("*.json"):
        config = configs.to_dict(configs.from_dict(entry.run_file(str(ROOT / "configs" / f"{path.stem}.py"))))
        stored = json.loads(path.read_text())["settings"]
        assert stored == json.loads(json.dumps(compare_settings.changed(config))), f"{path.name} is stale"


def test_a_band_needs_seeds_and_is_never_narrower_than_rounding(tmp_path):
    runs = compare_runs.load([str(path) for path in arm(tmp_path, "same", spread=0.0, seeds=range(3))])
    band = compare_reference.band(runs[0])["scores"]["shapes"]
    assert np.all(np.asarray(band["high"]) - np.asarray(band["low"]) >= 4 * 0.25 / 40)
    few = compare_runs.load([str(path) for path in arm(tmp_path, "few", seeds=range(2))])
    with pytest.raises(UserError, match="at least 3"):
        compare_reference.band(few[0])
