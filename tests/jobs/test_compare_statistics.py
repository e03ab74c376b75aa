"""The intervals of `compare`: how often they hold the truth, and what they find."""

import numpy as np
import pytest

from smart_grpo_jax.jobs import compare_statistics as cs

SIMULATIONS = 250


def runs(rng, seeds, prompts, effect=0.0, of_seed=0.0, of_prompt=0.0, rest=0.0):
    """d[s, p] = effect + a_s + b_p + e_sp."""
    return (
        effect
        + of_seed * rng.normal(size=(seeds, 1))
        + of_prompt * rng.normal(size=(1, prompts))
        + rest * rng.normal(size=(seeds, prompts))
    )


def shares(paired, seeds=5, prompts=60, **law):
    """How often the interval holds the truth, and how often it excludes 0."""
    rng = np.random.default_rng(3)
    effect = law.pop("effect", 0.0)
    holds = excludes = 0
    for _ in range(SIMULATIONS):
        one = runs(rng, seeds, prompts, effect, **law)
        other = np.zeros_like(one) if paired else runs(rng, seeds, prompts, rest=law.get("rest", 0.0))
        found = cs.difference(one, other, paired=paired)
        holds += found.low <= effect <= found.high
        excludes += found.verdict == "better"
    return holds / SIMULATIONS, excludes / SIMULATIONS


# The standard error of a share of .95 over 250 simulations is .014; 3 of them are allowed below. Above, the
# interval may be too long where prompts and seeds both count: 1 in 40 then, not 1 in 20, lies outside.
@pytest.mark.parametrize("paired", [True, False], ids=["paired", "apart"])
@pytest.mark.parametrize(
    "law",
    [
        {"of_seed": 0.02, "rest": 0.1},
        {"of_seed": 0.02, "of_prompt": 0.1, "rest": 0.2},
        {"of_prompt": 0.2, "rest": 0.2},
        {"rest": 0.3},
    ],
    ids=lambda law: "+".join(law),
)
def test_an_interval_of_five_seeds_holds_the_truth_as_often_as_it_says(law, paired):
    holds, _ = shares(paired, **law)
    assert 0.91 <= holds <= 0.995


def test_an_effect_of_twice_the_standard_error_of_the_seeds_is_often_found_and_none_seldom():
    law = {"of_seed": 0.02, "of_prompt": 0.05, "rest": 0.1}
    assert shares(True, effect=0.06, **law)[1] > 0.9
    assert shares(True, effect=0.0, **law)[1] < 0.06


def test_resampling_five_seeds_alone_would_claim_too_much():
    """What Student's law is for: the plain bootstrap over seeds holds the truth in about 84 of 100."""
    rng = np.random.default_rng(5)
    holds = 0
    for _ in range(SIMULATIONS):
        means = rng.normal(size=5)
        drawn = means[rng.integers(0, 5, (400, 5))].mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        holds += low <= 0 <= high
    assert holds / SIMULATIONS < 0.9


def test_equal_arms_differ_by_nothing_and_the_same_call_gives_the_same_interval():
    one = runs(np.random.default_rng(0), 5, 30, of_seed=0.1, rest=0.1)
    same = cs.difference(one, one, paired=True)
    assert (same.difference, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "open")
    other = runs(np.random.default_rng(1), 5, 30, rest=0.1)
    assert cs.difference(one, other) == cs.difference(one, other)


def test_one_seed_claims_nothing_of_a_repetition_but_what_is_not_trained_has_none():
    rng = np.random.default_rng(0)
    one, other = runs(rng, 1, 50, effect=0.5, rest=0.1), runs(rng, 1, 50, rest=0.1)
    assert cs.difference(one, other).verdict == "one seed"
    assert cs.difference(one, other, repeated=(False, False)).verdict == "better"
    assert cs.difference(one, runs(rng, 5, 50, rest=0.1), repeated=(False, True)).verdict == "better"


def test_prompts_without_a_score_are_left_out_and_repeated_prompts_are_drawn_together():
    rng = np.random.default_rng(0)
    one, other = runs(rng, 3, 20, 0.2, rest=0.1), runs(rng, 3, 20, rest=0.1)
    one[1, 4] = np.nan
    found = cs.difference(one, other)
    assert found.prompts == 19 and np.isfinite(found.low)
    nothing = cs.difference(np.full((2, 3), np.nan), np.zeros((2, 3)))
    assert nothing.prompts == 0 and nothing.verdict == "open"
    thrice = np.repeat(runs(rng, 1, 20, of_prompt=0.2), 3, axis=1)
    texts = [str(i) for i in range(20) for _ in range(3)]
    width = lambda prompts: np.subtract(*cs.difference(thrice, 0 * thrice, prompts)[1:3])
    assert abs(width(texts)) > 1.5 * abs(width(None))


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (60, 2.000)])
def test_students_quantiles_are_those_of_the_tables(freedom, value):
    assert cs.student(freedom) == pytest.approx(value, abs=1e-3)


def test_a_further_run_falls_into_the_prediction_band_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        values = rng.normal(size=6)
        _, low, high = cs.prediction(values[:5])
        inside += low <= values[5] <= high
    assert inside / 1000 == pytest.approx(0.95, abs=0.02)
    assert cs.prediction(np.ones(1))[1:] == (-np.inf, np.inf)
