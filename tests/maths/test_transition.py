import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_arrays import DOUBLE, LAST_LOG_PROB, LOG_PROBS, MEANS, RATIOS, load, nhwc

from smart_grpo_jax.maths import grpo, schedule, transition

STOCHASTIC = ("flow", "dance", "cps")
FLOW = load("sde_flow_cps")
DANCE = load("sde_dance")
STEPS = range(10)


def golden_step(g, kind, j, velocity="velocity", level="noise_level", dtype=np.float32):
    """The step j of a golden file, [b, h, w, c]."""
    x, v = (jnp.asarray(nhwc(g[name][j]), dtype) for name in ("sample", velocity))
    s = g["sigmas"].astype(dtype)
    # The float64 arrays were made from float32 sigmas and the float64 noise level.
    a = float(round(float(g[level]), 6)) if dtype is np.float64 else g[level]
    return transition.step(kind, x, v, s[j], s[j + 1], a, s[1])


def lp_tolerance(j):
    return LAST_LOG_PROB if j == 9 else LOG_PROBS


@pytest.mark.parametrize("j", STEPS)
def test_flow_step_equals_flow_grpo(j):
    assert FLOW["step_index"][j] == j
    step = golden_step(FLOW, "flow", j)
    np.testing.assert_allclose(step.mean, nhwc(FLOW["flow_mean"][j]), **MEANS)
    np.testing.assert_allclose(np.broadcast_to(step.std, 2), FLOW["flow_std"][j], **MEANS)
    h = FLOW["sigmas"][j] - FLOW["sigmas"][j + 1]
    np.testing.assert_allclose(np.broadcast_to(step.std / h**0.5, 2), FLOW["flow_std_dev_t"][j], **MEANS)
    x_next = transition.sample(step, nhwc(FLOW["noise"][j]))
    np.testing.assert_allclose(x_next, nhwc(FLOW["flow_prev_sample"][j]), **MEANS)


@pytest.mark.parametrize("j", STEPS)
def test_flow_log_prob_equals_flow_grpo(j):
    x_next = nhwc(FLOW["flow_prev_sample"][j])
    step, new = golden_step(FLOW, "flow", j), golden_step(FLOW, "flow", j, "velocity_new")
    lp = transition.log_prob(x_next, step.mean, step.std)
    np.testing.assert_allclose(lp, FLOW["flow_log_prob"][j], **lp_tolerance(j))
    np.testing.assert_allclose(lp, FLOW["flow_log_prob_f64"][j], **lp_tolerance(j))
    np.testing.assert_allclose(new.mean, nhwc(FLOW["flow_mean_new"][j]), **MEANS)
    lp_new = transition.log_prob(x_next, new.mean, new.std)
    np.testing.assert_allclose(lp_new, FLOW["flow_log_prob_new"][j], **lp_tolerance(j))


@pytest.mark.parametrize("j", STEPS)
def test_kl_and_guard_ratio_equal_the_published_ones(j):
    step, new = golden_step(FLOW, "flow", j), golden_step(FLOW, "flow", j, "velocity_new")
    dt = FLOW["sigmas"][j + 1] - FLOW["sigmas"][j]
    v = jnp.asarray(nhwc(FLOW["velocity"][j])), jnp.asarray(nhwc(FLOW["velocity_new"][j]))
    # A square of float32 differences: relative error twice that of the means' differences, about 1e-3 of v.
    close = dict(rtol=2e-4, atol=1e-9)
    for kind, name in (("flow_grpo", "flow_kl_code"), ("exact", "flow_kl_exact")):
        kl = transition.kl(kind, new.mean, step.mean, step.std, dt, *v)
        np.testing.assert_allclose(kl, FLOW[name][j], **close)
    velocity = transition.kl("velocity", new.mean, step.mean, step.std, dt, *v)
    np.testing.assert_allclose(velocity, np.square(v[0] - v[1]).mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(
        transition.kl("exact", new.mean, step.mean, step.std, dt, *v), FLOW["guard_bias"][j], **close
    )
    lp_new, lp = (jnp.asarray(FLOW[name][j]) for name in ("flow_log_prob_new", "flow_log_prob"))
    log_ratio = grpo.guard_log_ratio(lp_new, lp, new.mean, step.mean, step.std)
    np.testing.assert_allclose(jnp.exp(log_ratio), FLOW["guard_ratio"][j], **RATIOS)


@pytest.mark.parametrize("j", STEPS)
def test_flow_mean_in_double_precision(j):
    with jax.enable_x64(True):
        step = golden_step(FLOW, "flow", j, dtype=np.float64)
        np.testing.assert_allclose(step.mean[:1], nhwc(FLOW["flow_mean_f64"][j]), **DOUBLE)


@pytest.mark.parametrize("j", STEPS)
def test_cps_step_equals_the_published_formula(j):
    step, new = golden_step(FLOW, "cps", j), golden_step(FLOW, "cps", j, "velocity_new")
    np.testing.assert_allclose(step.mean, nhwc(FLOW["cps_mean"][j]), **MEANS)
    np.testing.assert_allclose(step.std, FLOW["cps_std"][j], **MEANS)
    x_next = transition.sample(step, nhwc(FLOW["noise"][j]))
    np.testing.assert_allclose(x_next, nhwc(FLOW["cps_prev_sample"][j]), **MEANS)
    stored = nhwc(FLOW["cps_prev_sample"][j])
    for policy, name in ((step, "cps_log_prob_unnorm"), (new, "cps_log_prob_unnorm_new")):
        lp = transition.log_prob_unnormalised(stored, policy.mean)
        np.testing.assert_allclose(lp, FLOW[name][j], **LOG_PROBS)


@pytest.mark.parametrize("j", STEPS)
def test_dance_step_equals_dance_grpo(j):
    step, new = (golden_step(DANCE, "dance", j, v, "eta") for v in ("velocity", "velocity_new"))
    np.testing.assert_allclose(step.mean, nhwc(DANCE["mean"][j]), **MEANS)
    np.testing.assert_allclose(step.std, DANCE["std"][j], **MEANS)
    x_next = transition.sample(step, nhwc(DANCE["noise"][j]))
    np.testing.assert_allclose(x_next, nhwc(DANCE["prev_sample"][j]), **MEANS)
    stored = nhwc(DANCE["prev_sample"][j])
    for policy, name in ((step, "log_prob"), (new, "log_prob_new")):
        lp = transition.log_prob(stored, policy.mean, policy.std)
        np.testing.assert_allclose(lp, DANCE[name][j], **lp_tolerance(j))


def test_timesteps_are_a_thousand_sigmas():
    np.testing.assert_allclose(1000 * schedule.sd3(10)[:-1], FLOW["timesteps"], rtol=3e-7)
    np.testing.assert_allclose(schedule.sd3(10), FLOW["sigmas"], rtol=3e-7)
    np.testing.assert_allclose(schedule.linspace(10), DANCE["sigmas"], rtol=3e-7)


@pytest.mark.parametrize("steps", [2, 6, 10, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_first_flow_std_is_the_noise_level(steps, shift):
    for kind in ("sd3", "linspace"):
        times = schedule.times(kind, steps, shift)
        # 1 - t_max is rounded once, so sigma sqrt(h) is the level to a few units of the last place.
        np.testing.assert_allclose(transition.stds("flow", times, 0.7)[0], 0.7, rtol=5e-7)
        x, v = jnp.full((1, 2), 1.5), jnp.full((1, 2), -0.3)
        mean = transition.step("flow", x, v, times[0], times[1], 0.7, times[1]).mean
        np.testing.assert_allclose(mean, x * (1 - 0.7**2 / 2) + v * (times[1] - 1), rtol=2e-6)


def random_state(seed=0, shape=(3, 4, 4, 2)):
    keys = jax.random.split(jax.random.key(seed), 2)
    return tuple(jax.random.normal(k, shape) for k in keys)


@pytest.mark.parametrize("kind", transition.STEPS)
def test_noise_level_zero_is_euler_to_the_bit(kind):
    x, v = random_state()
    times = jnp.asarray(schedule.sd3(10))

    def euler(x, v, t, t_next):
        return x + v * (t_next - t)

    def step(x, v, t, t_next, a):
        return transition.step(kind, x, v, t, t_next, a, times[1])

    for j in STEPS:
        plain = step(x, v, times[j], times[j + 1], 0.0)
        np.testing.assert_array_equal(plain.mean, euler(x, v, times[j], times[j + 1]))
        traced = jax.jit(step)(x, v, times[j], times[j + 1], jnp.float32(0))
        np.testing.assert_array_equal(traced.mean, jax.jit(euler)(x, v, times[j], times[j + 1]))
        assert float(plain.std) == float(traced.std) == 0


def test_last_cps_step_is_euler_with_noise_on():
    x, v = random_state()
    t = schedule.sd3(10)
    last = transition.step("cps", x, v, t[9], t[10], 0.7, t[1])
    assert float(last.std) == 0
    np.testing.assert_array_equal(last.mean, transition.step("ode", x, v, t[9], t[10], 0.7, t[1]).mean)


@pytest.mark.parametrize("kind", transition.STEPS)
def test_a_time_per_row_equals_row_by_row(kind):
    x, v = random_state()
    times, steps = jnp.asarray(schedule.sd3(10)), jnp.array([0, 5, 9])
    level = jnp.array([0.7, 0.0, 0.3])
    batch = transition.step(kind, x, v, times[steps], times[steps + 1], level, times[1])
    for i, j in enumerate(steps):
        row = transition.step(kind, x[i : i + 1], v[i : i + 1], times[j], times[j + 1], level[i], times[1])
        np.testing.assert_allclose(batch.mean[i : i + 1], row.mean, rtol=1e-6, atol=1e-7)
        assert jnp.broadcast_to(batch.std, (3, 1, 1, 1))[i, 0, 0, 0] == row.std


@pytest.mark.parametrize("kind", transition.STEPS)
@pytest.mark.parametrize("log_prob", transition.LOG_PROBS)
def test_no_step_has_a_nan_in_value_or_gradient(kind, log_prob):
    x, v = random_state()
    times = jnp.asarray(schedule.sd3(10))

    def loss(v, a, j):
        step = transition.step(kind, x, v, times[j], times[j + 1], a, times[1])
        lp = transition.LOG_PROBS[log_prob](x * 0.9, step.mean, step.std)
        kl = transition.kl("flow_grpo", step.mean, x, step.std, times[j + 1] - times[j], v, x)
        return lp.sum() + kl.sum(), step

    for j in STEPS:
        for a in (0.0, 0.7):
            (value, step), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(v, a, j)
            for leaf in jax.tree.leaves((value, step, grads)):
                assert bool(jnp.isfinite(leaf).all()), (j, a)


def test_deterministic_rows_have_log_prob_zero_and_no_gradient():
    x, mean = random_state()
    std = jnp.array([0.0, 0.5, 0.0])
    for log_prob in transition.LOG_PROBS.values():
        lp, pull = jax.vjp(lambda m, log_prob=log_prob: log_prob(x, m, std), mean)
        (gradient,) = pull(jnp.ones(3))
        assert lp[0] == lp[2] == 0 and lp[1] != 0
        assert not gradient[0].any() and not gradient[2].any() and gradient[1].any()


def test_log_prob_is_the_mean_of_normal_densities():
    x, mean = random_state()
    std = jnp.array([0.3, 1.0, 2.0])
    density = jax.scipy.stats.norm.logpdf(x, mean, std[:, None, None, None])
    np.testing.assert_allclose(transition.log_prob(x, mean, std), density.mean((1, 2, 3)), rtol=1e-5)


def test_bfloat16_input_is_computed_in_float32():
    x, v = (a.astype(jnp.bfloat16) for a in random_state())
    t = schedule.sd3(10)
    step = transition.step("flow", x, v, t[3], t[4], 0.7, t[1])
    assert step.mean.dtype == step.std.dtype == jnp.float32
    assert transition.log_prob(x, x, jnp.bfloat16(0.5)).dtype == jnp.float32


# The exact test-bed: x_t = (1-t) x0 + t x1 with known x0, x1, where v = x1 - x0 and every coefficient shows.
def coefficients(kind, t, t_next, a, t_max):
    """What a step makes of x0 and of x1, and its std."""
    take = lambda x0, x1: transition.step(kind, (1 - t) * x0 + t * x1, x1 - x0, t, t_next, a, t_max)
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    return float(take(one, zero).mean[0, 0]), float(take(zero, one).mean[0, 0]), float(take(one, one).std)


@pytest.mark.parametrize("j", STEPS)
@pytest.mark.parametrize("a", [0.0, 0.3, 0.7, 1.0])
def test_cps_keeps_the_coefficients(j, a):
    t = schedule.sd3(10).astype(float)
    c0, c1, s = coefficients("cps", t[j], t[j + 1], a, t[1])
    # The noise of x' is t' in all: (t'² - s²) + s².
    assert c0 == pytest.approx(1 - t[j + 1], abs=2e-6)
    assert c1**2 + s**2 == pytest.approx(t[j + 1] ** 2, abs=2e-6)


@pytest.mark.parametrize("j", range(1, 10))
def test_flow_has_the_known_excess_of_noise(j):
    t, a = schedule.sd3(10).astype(float), 0.7
    c0, c1, s = coefficients("flow", t[j], t[j + 1], a, t[1])
    h, sigma = t[j] - t[j + 1], a * (t[j] / (1 - t[j])) ** 0.5
    excess = sigma**2 * h**2 / t[j] + sigma**4 * h**2 / (4 * t[j] ** 2)
    assert c0 == pytest.approx(1 - t[j + 1], abs=2e-6)
    assert c1**2 + s**2 == pytest.approx(t[j + 1] ** 2 + excess, abs=3e-6)


def test_flow_leaves_the_tabulated_noise_at_step_eight():
    t = schedule.sd3(10).astype(float)
    _, c1, s = coefficients("flow", t[8], t[9], 0.7, t[1])
    assert (c1**2 + s**2) ** 0.5 == pytest.approx(0.240, abs=5e-4)  # three digits in the table


def marginal_error(kind, steps):
    """Error in mean and variance of x at t = 0.1 for data N(m, s²) under the exact velocity.

    The step is affine in x there, so both are followed without sampling. It starts from the exact law at
    t = 0.9: near t = 1 Flow-SDE's noise has no limit, and neither has its excess as the steps get finer.
    """
    m, s, a = 0.4, 0.7, 0.5
    times = np.linspace(0.9, 0.1, steps + 1)
    law = lambda t: ((1 - t) * m, (1 - t) ** 2 * s**2 + t**2)

    def one(carry, ts):
        mean, var = carry
        t, t_next = ts

        def f(x):
            r = (x - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)
            return transition.step(kind, x, t * r - (m + (1 - t) * s**2 * r), t, t_next, a, times[1])

        step, slope = f(mean), jax.grad(lambda x: f(x).mean)(mean)
        return (step.mean, slope**2 * var + step.std**2), None

    pairs = jnp.stack([times[:-1], times[1:]], 1)
    (mean, var), _ = jax.lax.scan(one, jax.tree.map(jnp.float32, law(0.9)), pairs)
    return max(abs(float(mean) - law(0.1)[0]), abs(float(var) - law(0.1)[1]))


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_fine_sde_keeps_the_marginals_of_a_gaussian(kind):
    coarse, fine = marginal_error(kind, 50), marginal_error(kind, 500)
    # Euler's error goes with the step: a tenth of it, within a fifth for the second order.
    assert fine == pytest.approx(coarse / 10, rel=0.2) and fine < 2e-3


@pytest.mark.parametrize("kind, level", [("ode", 0.7), ("flow", 0.7), ("dance", 0.3), ("cps", 0.8)])
def test_leverage_is_the_slope_of_the_mean_in_the_steps_own_noise(kind, level):
    times = np.array([1.0, 0.7, 0.3, 0.001, 0.0], np.float32)
    told = transition.leverage(kind, times, level)
    for j in range(4):
        mean = lambda v: transition.step(kind, 0.4, v, times[j], times[j + 1], level, times[1]).mean  # noqa: B023
        std = float(transition.step(kind, 0.4, 0.2, times[j], times[j + 1], level, times[1]).std)
        want = abs(float(jax.grad(mean)(0.2))) / std if std > 0 else 0.0
        np.testing.assert_allclose(told[j], want, rtol=1e-5)
    if kind == "cps":  # almost no noise, and the velocity still counts for the whole time before it
        assert told[2] > 100 * told[0]


def test_one_step_and_guidance():
    x0, x1 = random_state()
    t = jnp.array([0.1, 0.5, 1.0])
    tb = t[:, None, None, None]
    x = (1 - tb) * x0 + tb * x1
    np.testing.assert_allclose(transition.one_step(x, x1 - x0, t), x0, atol=1e-6)  # one rounding per term
    np.testing.assert_array_equal(transition.guide(x0, x1, 0.0), x0)
    np.testing.assert_allclose(transition.guide(x0, x1, 4.5), x0 + 4.5 * (x1 - x0))


def test_a_forecast_of_n_calls_is_n_steps_of_the_ode():
    """Also from a time that is traced, which the search has; of one call it is the one-step decode."""
    x, _ = random_state()
    field = lambda x, t: jnp.sin(x) * (1 + t)
    forecast = jax.jit(transition.forecast, static_argnums=(0, 4))
    run = lambda field, x, t, calls: forecast(field, x, field(x, t), t, calls)
    np.testing.assert_allclose(run(field, x, 0.6, 1), x - 0.6 * field(x, 0.6), rtol=1e-6, atol=1e-6)
    by_hand = x
    for t in (0.6, 0.4, 0.2):
        by_hand = by_hand - 0.2 * field(by_hand, t)
    np.testing.assert_allclose(run(field, x, 0.6, 3), by_hand, rtol=1e-5, atol=1e-6)  # float32 times
    np.testing.assert_array_equal(run(field, x, 0.0, 3), x)


def test_an_unknown_kind_names_the_nearest():
    x, v = random_state()
    with pytest.raises(ValueError, match="transition: got 'flaw', try \"flow\""):
        transition.step("flaw", x, v, 1.0, 0.9, 0.7, 0.9)
    with pytest.raises(ValueError, match="kl: got 'exakt', try \"exact\""):
        transition.kl("exakt", x, v, 0.1, -0.1, x, v)
