import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_arrays import DOUBLE, load, nhwc

from smart_grpo_jax.maths import search, transition

CEM = load("cem")


def exact_velocity(x, t):
    """The velocity of data N(m0, s0² I)."""
    m0, s0 = CEM["m0"], CEM["s0"]
    r = (x - (1 - t) * m0) / ((1 - t) ** 2 * s0**2 + t**2)
    return t * r - (m0 + (1 - t) * s0**2 * r)


def space(mode):
    """Where a candidate stands and the time at which it is decoded."""
    return (nhwc(CEM["mean"]), CEM["t_next"]) if mode == "transition" else (nhwc(CEM["X"]), CEM["t"])


def reward(mode, m):
    anchor, t = space(mode)
    z = anchor + CEM["std"] * m
    x0 = transition.one_step(z, exact_velocity(z, t), t)
    return -jnp.mean((x0 - nhwc(CEM["target"])) ** 2, axis=(-3, -2, -1))


def test_golden_transition_is_the_flow_step():
    with jax.enable_x64(True):
        x, t, t_next = jnp.asarray(nhwc(CEM["X"])), CEM["t"], CEM["t_next"]
        v = exact_velocity(x, t)
        np.testing.assert_allclose(v, nhwc(CEM["velocity"]), **DOUBLE)
        step = transition.step("flow", x, v, t, t_next, float(CEM["noise_level"]), 0.96)
        np.testing.assert_allclose(step.mean, nhwc(CEM["mean"]), **DOUBLE)
        np.testing.assert_allclose(step.std, CEM["std"], **DOUBLE)


@pytest.mark.parametrize("mode", ["transition", "latent"])
@pytest.mark.parametrize("select", ["greedy", "random"])
def test_rounds_equal_the_golden_search(mode, select):
    def golden(name):
        return CEM[f"{mode}_{select}_{name}"]

    with jax.enable_x64(True):
        s = search.settings(int(CEM["N"]), int(CEM["K"]), float(CEM["P"]), select=select)
        mu, sigma = jnp.zeros((4, 4, 4)), jnp.ones((4, 4, 4))
        for i, n in enumerate(nhwc(CEM["n"])):
            m = search.propose(mu, sigma, n)
            rewards = reward(mode, m)
            np.testing.assert_allclose(rewards, golden("rewards")[i], **DOUBLE)
            if select == "random":  # a lot that draws the golden indices, in their order
                rewards = jnp.zeros(s.candidates).at[CEM["random_select_idx"][i]].set(jnp.array([2.0, 1.0]))
            mu, sigma, order = search.refit(m, rewards, mu, sigma, s)
            np.testing.assert_array_equal(order[: s.elite], golden("idx")[i])
            np.testing.assert_allclose(mu, nhwc(golden("mu")[i]), **DOUBLE)
            np.testing.assert_allclose(sigma, nhwc(golden("sigma")[i]), **DOUBLE)
        np.testing.assert_allclose(reward(mode, mu), golden("mu_reward"), **DOUBLE)
        executed = transition.Transition(nhwc(CEM["mean"]), CEM["std"])
        np.testing.assert_allclose(transition.sample(executed, mu), nhwc(golden("x_next")), **DOUBLE)
        sample = search.propose(mu, sigma, nhwc(CEM["n_final"]))
        np.testing.assert_allclose(sample, nhwc(golden("sample")), **DOUBLE)


@pytest.mark.parametrize("mode", ["transition", "latent"])
def test_one_shot_equals_the_golden_search(mode):
    with jax.enable_x64(True):
        m = jnp.asarray(nhwc(CEM["n_oneshot"]))
        s = search.settings(rounds=1, candidates=25, elite=0.5)
        assert s.elite == 12
        rewards = reward(mode, m)
        np.testing.assert_allclose(rewards, CEM[f"{mode}_oneshot_rewards"], **DOUBLE)
        mu, _, order = search.refit(m, rewards, jnp.zeros((4, 4, 4)), jnp.ones((4, 4, 4)), s)
        np.testing.assert_array_equal(order[:12], CEM[f"{mode}_oneshot_idx"])
        np.testing.assert_allclose(mu, nhwc(CEM[f"{mode}_oneshot_mu"]), **DOUBLE)


def linear(m):
    """A reward of unit variance for N(0, I) noise."""
    return m.sum(axis=tuple(range(1, m.ndim))) / np.sqrt(np.prod(m.shape[1:]))


@functools.partial(jax.jit, static_argnums=(2, 3))
def compiled(key, settings, score, shape):
    return search.search(key, score, shape, settings)


def run(settings, seed=0, score=linear, shape=(4, 4, 2)):
    return compiled(jax.random.key(seed), settings, score, shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def many(settings, runs, score):
    keys = jax.random.split(jax.random.key(5), runs)
    return jax.vmap(lambda k: search.search(k, score, (4, 4, 4), settings))(keys)


def test_search_is_propose_score_refit():
    s = search.settings(rounds=4, keep_candidates=True)
    result = run(s)
    mu, sigma = jnp.zeros((4, 4, 2)), jnp.ones((4, 4, 2))
    for m, rewards, order in zip(result.candidates, result.rewards, result.order, strict=True):
        np.testing.assert_allclose(rewards, linear(m), rtol=1e-5, atol=1e-6)
        assert (jnp.diff(rewards[order]) <= 0).all()
        mu, sigma, again = search.refit(m, rewards, mu, sigma, s)
        np.testing.assert_array_equal(order, again)
    # One compiled body against op by op: reductions over the elite may round differently.
    np.testing.assert_allclose(result.mean, mu, atol=1e-6)
    np.testing.assert_allclose(result.std, sigma, atol=1e-6)
    np.testing.assert_array_equal(result.noise, result.mean)


def test_best_is_the_best_candidate_ever_scored():
    result = run(search.settings(rounds=3, candidates=6, elite=0.4, returns="best", keep_candidates=True))
    i, j = np.unravel_index(int(result.rewards.argmax()), result.rewards.shape)
    np.testing.assert_array_equal(result.noise, result.candidates[i, j])
    np.testing.assert_array_equal(result.noise, result.best_noise)
    assert result.best_reward == result.rewards.max()


def test_candidates_are_kept_only_when_asked_for():
    assert run(search.settings()).candidates is None


def test_sample_spreads_about_the_mean():
    mean, sample = (run(search.settings(returns=r)) for r in ("mean", "sample"))
    np.testing.assert_array_equal(mean.mean, sample.mean)
    z = (sample.noise - sample.mean) / sample.std
    n = jax.random.normal(jax.random.fold_in(jax.random.key(0), 5), z.shape)
    np.testing.assert_allclose(z, n, atol=1e-3)  # sigma falls to 0.001 after five rounds


def test_every_variant_of_the_traced_settings_runs_one_program():
    traces = []

    @jax.jit
    def program(key, s):
        traces.append(1)
        return search.search(key, linear, (4, 4, 2), s).noise

    for options in (
        {},
        {"returns": "best"},
        {"select": "random"},
        {"noise_norm": "rms"},
        {"sigma_floor": 0.1, "smoothing": 0.5},
    ):
        s = search.settings(**options)
        np.testing.assert_allclose(program(jax.random.key(1), s), run(s, seed=1).noise, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_result_does_not_depend_on_the_batch():
    s = search.settings()
    keys = jax.random.split(jax.random.key(3), 4)
    batch = jax.jit(jax.vmap(lambda k: search.search(k, linear, (4, 4, 2), s).noise))(keys)
    for key, row in zip(keys, batch, strict=True):
        np.testing.assert_allclose(compiled(key, s, linear, (4, 4, 2)).noise, row, atol=1e-6)


def test_ties_go_to_the_lower_index_and_nan_comes_last():
    m = jnp.arange(5.0)[:, None] * jnp.ones((5, 2))
    s = search.settings(elite=0.4)
    _, _, order = search.refit(m, jnp.array([1.0, jnp.nan, 2.0, 1.0, 2.0]), m[0], m[1], s)
    assert order.tolist() == [2, 4, 0, 3, 1]
    _, _, order = search.refit(m, jnp.array([jnp.inf, -jnp.inf, -3.0, 0.0, jnp.nan]), m[0], m[1], s)
    assert order.tolist()[:2] == [3, 2]


def test_too_few_finite_rewards_keep_the_law():
    m = jax.random.normal(jax.random.key(0), (5, 3))
    mu, sigma = jnp.full(3, 0.5), jnp.full(3, 0.7)
    bad = jnp.full(5, jnp.nan).at[2].set(1.0)
    kept = search.refit(m, bad, mu, sigma, search.settings(elite=0.4))
    np.testing.assert_array_equal(kept[0], mu)
    np.testing.assert_array_equal(kept[1], sigma)


@pytest.mark.parametrize("returns", search.RETURNS)
def test_a_search_that_never_gets_a_reward_returns_plain_noise(returns):
    result = run(search.settings(returns=returns), score=lambda m: jnp.full(len(m), jnp.nan))
    n = jax.random.normal(jax.random.fold_in(jax.random.key(0), 5), (4, 4, 2))
    np.testing.assert_array_equal(result.noise, n)
    assert (result.mean == 0).all() and (result.std == 1).all()


def test_a_failing_score_never_wins():
    def score(m):
        return jnp.where(jnp.arange(len(m)) % 2 == 0, linear(m), jnp.nan)

    result = run(search.settings(returns="best", keep_candidates=True), score=score)
    assert jnp.isfinite(result.best_reward) and jnp.isfinite(result.noise).all()
    assert result.best_reward == jnp.nanmax(result.rewards)


def test_smoothing_moves_part_of_the_way():
    m = jax.random.normal(jax.random.key(0), (5, 3))
    mu, sigma = jnp.full(3, 0.5), jnp.full(3, 0.7)
    full = search.refit(m, linear(m), mu, sigma, search.settings())
    half = search.refit(m, linear(m), mu, sigma, search.settings(smoothing=0.25))
    np.testing.assert_allclose(half[0], 0.25 * full[0] + 0.75 * mu, rtol=1e-6)
    np.testing.assert_allclose(half[1], 0.25 * full[1] + 0.75 * sigma, rtol=1e-6)


def test_floor_and_unbiased_variance():
    m = jax.random.normal(jax.random.key(0), (6, 8))
    zero, one = jnp.zeros(8), jnp.ones(8)
    elite = m[jnp.argsort(-linear(m))[:3]]
    biased = search.refit(m, linear(m), zero, one, search.settings(candidates=6))[1]
    np.testing.assert_allclose(biased, elite.std(0), rtol=1e-6)
    floored = search.refit(m, linear(m), zero, one, search.settings(candidates=6, sigma_floor=0.6))[1]
    np.testing.assert_allclose(floored, jnp.maximum(biased, 0.6), rtol=1e-6)
    assert (biased < 0.6).any() and (biased > 0.6).any()
    unbiased = search.refit(m, linear(m), zero, one, search.settings(candidates=6, unbiased=True))[1]
    np.testing.assert_allclose(unbiased, biased * 1.5**0.5, rtol=1e-6)


def test_rms_norm_gives_length_one_whatever_is_returned():
    for returns in search.RETURNS:
        noise = run(search.settings(returns=returns, noise_norm="rms")).noise
        assert float(jnp.mean(noise**2)) == pytest.approx(1, rel=1e-5)
    assert (search.unit_rms(jnp.zeros(4)) == 0).all()


RUNS = 2000


def moments(noise):
    """Mean, mean square and kurtosis over the runs and dimensions."""
    z = np.asarray(noise, np.float64).ravel()
    return z.mean(), (z**2).mean(), (z**4).mean() / (z**2).mean() ** 2


def normal_distance(sample):
    """Largest distance between the distribution of a sample and the normal one (Kolmogorov-Smirnov)."""
    z = np.sort(np.asarray(sample, np.float64).ravel())
    cdf = np.asarray(jax.scipy.special.ndtr(z))
    above = np.arange(1, len(z) + 1) / len(z)
    return max(np.abs(above - cdf).max(), np.abs(above - 1 / len(z) - cdf).max())


@pytest.mark.parametrize("returns", search.RETURNS)
def test_random_selection_with_floor_one_is_iid_noise(returns):
    """Returned noise, and each run's normalised sum (on which the reward depends), are N(0, 1)."""
    s = search.settings(returns=returns, select="random", sigma_floor=1.0)
    result = many(s, RUNS, linear)
    mean, square, kurtosis = moments(result.noise)
    # 128,000 draws: standard errors 0.003, 0.004 and 0.014; three or four of them.
    assert abs(mean) < 0.01 and abs(square - 1) < 0.016 and abs(kurtosis - 3) < 0.05
    # 1.95 / sqrt(n) is exceeded by chance once in a thousand.
    assert normal_distance(result.noise) < 1.95 / np.sqrt(result.noise.size)
    sums = jax.vmap(lambda m: linear(m[None])[0])(result.noise)
    assert normal_distance(sums) < 1.95 / np.sqrt(RUNS)
    gram = np.asarray(result.noise.reshape(RUNS, -1))
    correlation = gram.T @ gram / RUNS - np.eye(64)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(RUNS) * np.sqrt(2)  # 4,096 entries, normal tails


def test_candidates_of_random_selection_with_floor_one_are_iid_noise():
    s = search.settings(select="random", sigma_floor=1.0, keep_candidates=True)
    result = many(s, 1000, linear)
    for i in range(5):
        assert normal_distance(result.candidates[:, i]) < 1.95 / np.sqrt(result.candidates[:, i].size)
    rewards = np.asarray(result.rewards)  # independent normals of unit variance, within rounds and across
    assert normal_distance(rewards) < 1.95 / np.sqrt(rewards.size)
    assert np.abs(np.corrcoef(rewards.reshape(1000, 25).T) - np.eye(25)).max() < 4.5 / np.sqrt(1000)


def test_random_selection_never_reads_the_rewards():
    for returns in search.RETURNS:
        s = search.settings(returns=returns, select="random")
        a, b = run(s), run(s, score=lambda m: -(m**2).sum((1, 2, 3)) + jnp.nan)
        np.testing.assert_array_equal(a.noise, b.noise)


@pytest.mark.parametrize("rounds, candidates, elite", [(5, 5, 2), (1, 25, 12)])
def test_length_of_the_mean_without_selection(rounds, candidates, elite):
    """sigma² shrinks by 1 - 1/T a round, so the mean has variance 1 - (1 - 1/T)^N."""
    s = search.settings(rounds, candidates, elite / candidates, select="random")
    result = many(s, RUNS, linear)
    expected = 1 - (1 - 1 / elite) ** rounds
    # Heavy tails: the fourth moment is 6, so the standard error is sqrt(5 / 128000) of the value.
    assert moments(result.noise)[1] == pytest.approx(expected, rel=0.02)
    assert float((result.std**2).mean()) == pytest.approx(1 - expected, rel=0.1)


def test_gain_of_the_search_for_a_linear_reward():
    """The table of docs/algorithm.md, section 5: iterative 2.26, one-shot 0.80, rescaled one-shot 2.65,
    best of 25 1.97, random 0; D = 64."""
    gain = lambda **o: float(
        jax.vmap(lambda m: linear(m[None])[0])(many(search.settings(**o), RUNS, linear).noise).mean()
    )
    shot = dict(rounds=1, candidates=25)
    # The standard error is at most 1 / sqrt(2000) = 0.022; three of them.
    assert gain() == pytest.approx(2.26, abs=0.07)
    assert gain(**shot) == pytest.approx(0.80, abs=0.07)
    assert gain(**shot, noise_norm="rms") == pytest.approx(2.65, abs=0.07)
    assert gain(**shot, returns="best") == pytest.approx(1.97, abs=0.07)
    assert gain(select="random") == pytest.approx(0, abs=0.07)


def test_pairs_point_apart_and_the_better_of_two_gains_more():
    """E max(z, -z) = sqrt(2 / pi) = .80, E max(z1, z2) = 1 / sqrt(pi) = .56; 1 / sqrt(2000) is .022."""
    found = run(search.settings(rounds=1, candidates=5, antithetic=True, keep_candidates=True))
    n = found.candidates[0]
    np.testing.assert_array_equal(n[0], -n[1])
    np.testing.assert_array_equal(n[2], -n[3])
    assert not np.allclose(n[0], n[2]) and not np.allclose(abs(n[4]), abs(n[2]))
    gain = lambda **o: float(
        many(search.settings(rounds=1, elite=1.0, returns="best", **o), RUNS, linear).best_reward.mean()
    )
    assert gain(candidates=2, antithetic=True) == pytest.approx(np.sqrt(2 / np.pi), abs=0.05)
    assert gain(candidates=2) == pytest.approx(1 / np.sqrt(np.pi), abs=0.06)
    assert gain(candidates=4, antithetic=True) > gain(candidates=4) + 0.02
    noise = many(search.settings(antithetic=True, select="random", sigma_floor=1.0), RUNS, linear).noise
    assert moments(noise)[1] == pytest.approx(1, abs=0.02)


def test_search_finds_the_target_of_the_exact_test_bed():
    """On the closed-form velocity the mean of the greedy search beats the plain step's reward."""
    score = lambda m: reward("transition", m)
    searched = float(jax.vmap(score)(many(search.settings(), 200, score).noise).mean())
    plain = float(jax.vmap(score)(jax.random.normal(jax.random.key(0), (200, 4, 4, 4))).mean())
    assert searched > plain + 0.1


@pytest.mark.parametrize(
    "candidates, fraction, count", [(5, 0.5, 2), (25, 0.5, 12), (5, 0.4, 2), (100, 0.29, 29), (4, 1, 4)]
)
def test_elite_count(candidates, fraction, count):
    assert search.elite_count(candidates, fraction) == count


@pytest.mark.parametrize(
    "options, words",
    [
        ({"elite": 0.1}, "got 0.1 of 5"),
        ({"elite": 1.5}, "got 1.5 of 5"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"elite": 0.2}, "one elite in 5 rounds"),
        ({"elite": 0.2, "rounds": 1, "unbiased": True}, "unbiased"),
        ({"smoothing": 0.0}, "smoothing: got 0.0"),
        ({"sigma_floor": 2.0}, "sigma_floor: got 2.0"),
        ({"returns": "men"}, 'try "mean"'),
        ({"select": "gredy"}, 'try "greedy"'),
        ({"noise_norm": "rsm"}, 'try "rms"'),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        search.settings(**options)


def test_settings_are_data_but_for_what_fixes_the_program():
    s = search.settings(sigma_floor=0.25)
    leaves, tree = jax.tree.flatten(s)
    assert len(leaves) == 5
    assert jax.tree.structure(search.settings(returns="best")) == tree
    assert jax.tree.structure(search.settings(rounds=4)) != tree
    changed = dataclasses.replace(s, sigma_floor=jnp.float32(0.5))
    assert float(changed.sigma_floor) == 0.5 and changed.elite == 2
