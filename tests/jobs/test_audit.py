"""The audit: its arithmetic, its rule, what it measures on a tiny model, and the run that relies on it."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import tiny_run

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import (
    assemble,
    audit,
    audit_numbers,
    audit_picture,
    audit_report,
    measured_window,
    statistics,
)
from smart_grpo_jax.jobs.audit_numbers import Interval, Step
from smart_grpo_jax.maths import window
from smart_grpo_jax.rewards.user import reward
from smart_grpo_jax.runtime.metrics import read

NAN = float("nan")
TEXTS = ["a", "b", "c", "d", "e", "f"]
BRIGHT = ("rewards.shapes=0", "rewards.test_audit:brightness=1", "eval_rewards.shapes_aesthetic=0")
SMALL = (*BRIGHT, "audit.prompts=4", "audit.members=3", "search.returns=best")


@reward
def brightness(images):
    """A reward that every search can raise, on any model."""
    return images.mean((1, 2, 3))


def step(j, gain, low=None, fidelity=0.5, steps=10):
    """A step of an audit, with the numbers that the rule looks at."""
    low = gain / 2 if low is None else low
    faithful = Interval(fidelity, fidelity - 0.1, fidelity + 0.1)
    bounds = Interval(gain, low, 2 * gain - low)
    t, t_next = 1 - j / steps, 1 - (j + 1) / steps
    return Step(j, t, t_next, True, faithful, faithful, 0.1, 0.5, bounds, 1.0, 35, {})


def an_audit(config, gains=(0.02, 0.1, 0.12, 0.09, 0.01), steps=6):
    """An audit of a config that has never been made."""
    found = [step(j, gain, steps=steps) for j, gain in enumerate(gains)]
    nothing = Interval(NAN, NAN, NAN)
    found.append(found[-1]._replace(step=steps - 1, t=1 / steps, t_next=0.0, spread=NAN, gain=nothing))
    chosen = audit_numbers.recommend(found, np.ones(steps, bool), 3)
    nfe = {"velocity": 100, "backward": 0, "decode": 50, "reward": 50, "images": 10}
    identity = audit_report.identity(config)
    return audit_report.Audit(
        identity, "base", 0, 4, 3, 0.5, 0.2, tuple(found), chosen, chosen, nfe, 12.0, 3.0
    )


def tiny_config(folder, *overrides):
    """The config that the command line would make."""
    from smart_grpo_jax.flags import parse
    from smart_grpo_jax.main import MODES, load_config

    return load_config(parse(tiny_run.command(folder, *overrides), MODES))


# The arithmetic


def test_equal_scores_share_the_middle_of_their_ranks():
    assert audit_numbers.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    final = rng.normal(size=9)
    assert audit_numbers.spearman(np.exp(3 * final), final) == pytest.approx(1)
    assert audit_numbers.spearman(-(final**3), final) == pytest.approx(-1)
    early, order = rng.permutation(9.0 + np.arange(9)), np.arange(9.0)
    # without ties the textbook form 1 - 6 Σ d² / n(n² - 1) holds
    d = audit_numbers.ranks(early) - order
    assert audit_numbers.spearman(early, order) == pytest.approx(1 - 6 * (d**2).sum() / (9 * 80))


def test_a_judge_that_says_nothing_has_no_fidelity_and_a_flat_group_has_no_order_to_predict():
    final = np.array([0.1, 0.5, 0.9])
    assert audit_numbers.spearman(np.ones(3), final) == 0
    assert np.isnan(audit_numbers.spearman(final, np.ones(3)))
    assert audit_numbers.spearman(np.array([1.0, NAN, 3.0]), np.array([0.1, 9.0, 0.9])) == pytest.approx(1)
    with_a_flat_one = audit_numbers.fidelity(np.stack([final] * 2), np.stack([final, np.ones(3)]), ["a", "b"])
    assert with_a_flat_one.value == pytest.approx(1)


def test_the_bootstrap_interval_is_about_two_standard_errors_and_the_same_every_time():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=200)
    texts = [str(i) for i in range(200)]
    found = audit_numbers.bootstrap(values, texts)
    assert found.value == pytest.approx(values.mean())
    # 2,000 resamples leave a noise of some percent in the ends
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert audit_numbers.bootstrap(values, texts) == found


def test_groups_of_one_prompt_count_as_one_draw():
    values = np.repeat(np.random.default_rng(2).normal(size=20), 4)
    once = audit_numbers.bootstrap(values, [str(i // 4) for i in range(80)])
    apart = audit_numbers.bootstrap(values, [str(i) for i in range(80)])
    # four copies of a prompt carry no news: pretending they do halves the interval
    assert (once.high - once.low) / (apart.high - apart.low) == pytest.approx(2, rel=0.15)
    alone = audit_numbers.bootstrap(np.array([0.5, NAN]), ["a", "b"])
    assert alone.value == 0.5 and np.isnan(alone.low)


def test_spread_is_the_mean_sample_std_of_what_is_finite():
    rewards = np.random.default_rng(3).normal(size=(5, 7, 4))
    assert audit_numbers.spread(rewards) == pytest.approx(rewards.std(-1, ddof=1).mean())
    rewards[0, 0, 0] = NAN
    rewards[1, 1, 1:] = NAN  # one candidate alone has no spread
    each = [
        np.std(row[np.isfinite(row)], ddof=1) for row in rewards.reshape(-1, 4) if np.isfinite(row).sum() > 1
    ]
    assert audit_numbers.spread(rewards) == pytest.approx(np.mean(each))
    assert np.isnan(audit_numbers.spread(rewards[..., :1]))


# The rule

GAINS = [0.02, 0.10, 0.12, 0.09, 0.07, 0.02, 0.01]
CASES = {
    "the best and its neighbours of at least half its gain": (GAINS, {}, 7, (1, 2, 3, 4)),
    "no more than allowed: the stretch that gains most": (GAINS, {}, 3, (1, 2, 3)),
    "one step": (GAINS, {}, 1, (2,)),
    "a step without proof ends the window": (GAINS, {3: {"low": -0.01}}, 7, (1, 2)),
    "a judge that is certainly upside down ends it, too": (GAINS, {1: {"fidelity": -0.4}}, 7, (2, 3, 4)),
    "a judge that may be": (GAINS, {1: {"fidelity": -0.05}}, 7, (1, 2, 3, 4)),
    "the best without proof: the next best": (GAINS, {2: {"low": -0.5}}, 7, (1,)),
    "nothing is proven": (GAINS, {j: {"low": -0.1} for j in range(7)}, 7, ()),
    "losses are not gains": ([-0.1, -0.2, -0.3], {}, 3, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_window_is(case):
    gains, changed, most, wanted = CASES[case]
    steps = [step(j, gain, **changed.get(j, {})) for j, gain in enumerate(gains)]
    assert audit_numbers.recommend(steps, np.ones(len(gains), bool), most) == wanted


def test_only_allowed_steps_stand_in_a_window():
    steps = [step(j, gain) for j, gain in enumerate(GAINS)]
    assert audit_numbers.recommend(steps, np.arange(7) > 2, 3) == (3, 4)
    assert audit_numbers.recommend(steps, np.zeros(7, bool), 3) == ()


# A window on another grid


def test_a_window_is_itself_on_its_own_grid_and_twice_as_many_steps_on_one_twice_as_fine():
    times = (3 * np.linspace(1, 0, 11) / (1 + 2 * np.linspace(1, 0, 11))).astype(np.float32)
    for first, last in [(0, 0), (1, 3), (4, 8), (9, 9)]:
        spec = window.span(times, range(first, last + 1))
        mask = window.step_mask(spec, 10, times, stochastic=np.ones(10, bool))
        assert np.flatnonzero(mask).tolist() == list(range(first, last + 1))
        fine = np.insert(times, np.arange(1, 11), (times[1:] + times[:-1]) / 2)
        mask = window.step_mask(spec, 20, fine, stochastic=np.ones(20, bool))
        assert np.flatnonzero(mask).tolist() == list(range(2 * first, 2 * last + 2))


def test_a_grid_too_coarse_for_the_window_searches_the_nearest_step():
    times = np.array([1, 0.5, 0.0])
    assert window.step_mask("0.6..0.7", 2, times, np.ones(2, bool)).tolist() == [False, True]
    assert window.step_mask("0.8..0.9", 2, times, np.ones(2, bool)).tolist() == [True, False]


@pytest.mark.parametrize("steps", ["0.9..0.5", "0.5..1.2", "0.5..", "a..b", "0.5..0.7..0.9", "otto"])
def test_a_range_that_is_none_is_refused_by_name(steps):
    with pytest.raises(UserError, match=r"search\.steps: got"):
        configs.from_dict({"search": {"steps": steps}})


def test_auto_and_a_range_are_values_of_search_steps():
    for steps in ("auto", "0.55..0.9", "0..1"):
        assert configs.from_dict({"search": {"steps": steps}}).search.steps == steps


# What is written


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "run", "search.steps=auto")


def test_an_audit_survives_its_file_and_the_file_is_json_without_nan(config, tmp_path):
    found = an_audit(config)
    path = audit.store(found, tmp_path / "run")
    again = audit_report.from_json(json.loads(path.read_text(), parse_constant=pytest.fail))
    assert repr(again) == repr(found)  # NaN is not equal to itself, but prints alike
    assert json.loads(path.read_text())["recommended"] == {"steps": [1, 2, 3], "times": "0.333333..0.833333"}


def test_the_table_marks_the_window_and_says_how_to_use_it(config):
    text = audit_report.text(an_audit(config))
    assert [line[0] for line in text.splitlines() if line.endswith("◀")] == ["1", "2", "3"]
    assert "recommended: search.steps=1,2,3" in text
    flat = an_audit(config, gains=(-0.1,) * 5)
    assert "nothing is recommended" in audit_report.text(flat)
    elsewhere = an_audit(config)._replace(usable=(1,))
    assert "in this sampler.window: search.steps=1" in audit_report.text(elsewhere)


def test_small_rewards_are_shown_with_the_digits_they_need():
    assert [audit_report.digits(std) for std in (40.0, 0.3, 0.02, 0.0)] == [1, 3, 4, 3]


def test_the_picture_is_well_formed_shades_the_window_and_shows_every_number(config):
    found = an_audit(config)
    picture = audit_picture.svg(found)
    root = ElementTree.fromstring(picture)
    shades = [e for e in root.iter() if e.get("class") == "shade"]
    assert len(shades) == 2 and "steps 1–3" in picture and "prefers-color-scheme: dark" in picture
    dots = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(dots) == 6 + 5 + 5 + 5
    assert all(57 < float(dot.get("cx")) < 431 and 40 < float(dot.get("cy")) < 300 for dot in dots)
    nothing = found._replace(recommended=(), usable=())
    assert "shade" not in audit_picture.svg(nothing).split("</style>")[1]


# Where a run takes its window from


def test_auto_takes_the_window_of_an_audit_that_fits(config, tmp_path):
    folder = tmp_path / "run"
    assert measured_window.known(config, folder) is None
    audit.store(an_audit(config), folder)
    found = measured_window.settled(config, folder)
    assert found.config.search.steps == "0.333333..0.833333" and found.nfe["velocity"] == 100
    given = tiny_config(folder, "search.steps=1,2")
    assert measured_window.settled(given, folder).config is given


@pytest.mark.parametrize(
    "change", ["sampler.noise_level=0.5", "search.candidates=4", "search_reward.compressibility=1"]
)
def test_an_audit_of_something_else_is_not_used_and_says_why(config, tmp_path, change, capsys):
    folder = tmp_path / "run"
    audit.store(an_audit(config), folder)
    other = tiny_config(folder, "search.steps=auto", change)
    assert measured_window.known(other, folder) is None
    assert "does not fit this config" in capsys.readouterr().out


def test_what_changes_no_rollout_does_not_age_an_audit(config, tmp_path):
    folder = tmp_path / "run"
    audit.store(an_audit(config), folder)
    same = tiny_config(
        folder,
        "search.steps=auto",
        "seed=3",
        "prompts.groups=8",
        "search.members=0.5",
        "sampler.eval_steps=9",
    )
    assert measured_window.known(same, folder) is not None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "steps": 3}', "\0"])
def test_a_file_that_is_no_audit_is_passed_over(config, tmp_path, text, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "audit.json").write_text(text)
    assert measured_window.known(config, tmp_path / "run") is None
    assert "is not an audit" in capsys.readouterr().out


def test_an_audit_that_found_nothing_stops_the_run_in_one_line(config, tmp_path):
    audit.store(an_audit(config, gains=(-0.1,) * 5), tmp_path / "run")
    with pytest.raises(UserError, match="no step with noise gains beyond doubt"):
        measured_window.settled(config, tmp_path / "run")


def test_a_job_that_only_looks_never_measures(tmp_path):
    folder = tmp_path / "run"
    plain = tiny_config(folder, "search.steps=auto")
    assert measured_window.asked(plain, folder).search.steps == "all"  # without eval.search it is not used
    searched = tiny_config(folder, "search.steps=auto", "eval.search=true")
    with pytest.raises(UserError, match="--mode=rewards --audit"):
        measured_window.asked(searched, folder)
    audit.store(an_audit(searched), folder)
    assert measured_window.asked(searched, folder).search.steps == "0.333333..0.833333"


# What can be said wrongly


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--audit"], "--audit: got --mode=train, wanted --mode=rewards"),
        (["--mode=rewards"], "got no question, wanted --check, --bench, --audit"),
        (["--mode=rewards", "--audit=yes"], '--audit: got "yes", wanted no value'),
        (["--mode=rewards", "--audit", "--config.sampler.transition=ode", "--config.search.rounds=0",
          "--config.train.loss=nft"], "has no noise to search"),
        (["--mode=rewards", "--audit", "--config.audit.members=2"], "audit.members"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, capsys, flags, said):
    argv = [a for a in tiny_run.command(tmp_path / "run") if not a.startswith("--mode")]
    assert tiny_run.entry.main([*argv, *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_noisy_steps_are_those_of_every_epoch(tmp_path):
    def steps(*overrides):
        config = tiny_config(tmp_path / "run", *overrides)
        return np.flatnonzero(audit.noisy(config)).tolist()

    assert steps() == [0, 1, 2, 3, 4]
    assert steps("sampler.window.kind=fixed", "sampler.window.start=1") == [1, 2, 3]
    assert steps("sampler.window.kind=sliding") == [0, 1, 2, 3, 4]
    moving = ("sampler.window.kind=random", "sampler.window.start=1", "sampler.window.size=2")
    assert steps(*moving) == [1, 2, 3, 4] and steps(*moving, "sampler.window.stop=4") == [1, 2, 3]


# What is measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """An audit of the tiny model, and the rollouts from which it can be computed again."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    config = audit.searching(tiny_config(folder, *SMALL))
    run = assemble.assemble(config, audit.items(config), training=False)
    weights = run.state().params
    found = audit.measure(run, weights, np.arange(6) < 3, "base")
    draw = audit.Draw(run, audit.columns(run)[1], weights)
    return run, found, draw


@pytest.mark.slow
def test_a_gain_is_the_difference_of_the_same_noise_with_and_without_the_search(measured):
    run, found, draw = measured
    base = draw(audit.rollout_knobs(run))
    searched = draw(audit.rollout_knobs(run, 2))
    difference = searched.final[..., 0] - base.final[..., 0]
    assert found.steps[2].gain.value == pytest.approx(difference.mean(), rel=1e-5)
    low, high = found.steps[2].gain[1:]
    _, half = statistics.interval(difference)
    # the bootstrap of 4 prompts is narrower than normal theory: it divides by n, not n - 1
    assert (high - low) / 2 == pytest.approx(half, rel=0.35)
    assert found.steps[2].gain.low > 0  # the best of three is brighter
    assert np.isnan(found.steps[4].gain.value) and found.recommended == found.usable


@pytest.mark.slow
def test_both_programs_draw_the_same_images_and_the_last_judgement_is_the_finished_one(measured):
    run, found, draw = measured
    plain, base = draw(audit.rollout_knobs(run), one_step=True), draw(audit.rollout_knobs(run))
    # two programs of XLA may add in another order
    np.testing.assert_allclose(plain.final, base.final, atol=1e-5)
    np.testing.assert_array_equal(plain.early[-1], plain.final)
    # candidates are decoded where the step arrives
    assert [s.judged for s in found.steps[:-1]] == [s.fidelity for s in found.steps[1:]]
    # the last step has almost no way left to go
    assert found.steps[-1].fidelity.value > 0.9 > found.steps[0].fidelity.value
    assert plain.early is not None and plain.early.shape == (7, 4, 3, plain.final.shape[-1])


@pytest.mark.slow
def test_spread_is_over_the_candidates_of_a_state_in_the_first_round(measured):
    run, found, draw = measured
    tried = draw(audit.rollout_knobs(run, 1)).tried
    assert tried is not None and tried.shape == (6, 4, 3, 3)
    assert (tried[[0, 2, 3, 4, 5]] == 0).all()  # nothing but step 1 was searched
    assert found.steps[1].spread == pytest.approx(tried[1].std(-1, ddof=1).mean(), rel=1e-5)
    assert found.steps[1].share == pytest.approx(found.steps[1].spread / found.group_std)


@pytest.mark.slow
def test_parts_of_the_reward_and_calls_are_counted(measured):
    _, found, _ = measured
    assert {"shapes", "shapes/strict"} >= set(found.steps[0].parts) and "shapes" in found.steps[0].parts
    images = 4 * 3
    fidelity, base, one_searched = images * (6 + 1), images * 6, images * (6 + 3)
    assert found.nfe["velocity"] == fidelity + base + 3 * one_searched
    assert found.steps[1].nfe == 6 + 3


# The run that relies on it

AUTO = (*SMALL, "search.steps=auto", "eval.search=true", "sampler.eval_steps=12", "eval.prompts=4",
        "checkpoint.every=1", "eval.every=0", "train.epochs=2")  # fmt: skip


@pytest.mark.slow
def test_a_run_measures_its_window_once_and_a_resumed_one_searches_the_same_steps(tmp_path, capsys):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert tiny_run.run(whole, *AUTO) == 0
    assert "measuring at which steps the search pays" in capsys.readouterr().out
    found = audit_report.from_json(json.loads((whole / "audit.json").read_text()))
    assert (whole / "audit.svg").exists() and found.usable
    rows = read(whole)
    assert {k for k in rows[1] if k.startswith("search/") and k.endswith("first")} == {
        f"search/step_{j}/first" for j in found.usable
    }
    assert rows[0]["nfe/velocity"] == found.nfe["velocity"]
    # stopped after the audit and before any checkpoint
    torn.mkdir()
    shutil.copy(whole / "audit.json", torn)
    assert tiny_run.run(torn, *AUTO, "train.epochs=1") == 0
    # the checkpoint remembers the window, whatever becomes of the file
    others = tuple(j for j in range(5) if j not in found.usable)[:1]
    wrong = found._replace(usable=others, recommended=others)
    audit.store(wrong, torn)
    assert tiny_run.run(torn, *AUTO) == 0
    assert "measuring at which steps" not in capsys.readouterr().out
    assert tiny_run.state_hash(torn) == tiny_run.state_hash(whole)
    assert tiny_run.timeless(torn)[2] == tiny_run.timeless(whole)[2]
