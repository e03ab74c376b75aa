import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_arrays import DOUBLE, load

from smart_grpo_jax.maths import grpo

GOLDEN = load("grpo")
IDS = np.unique(GOLDEN["prompt_ids"], return_inverse=True)[1].astype(np.int32)
GROUPS = int(IDS.max()) + 1
REWARDS = GOLDEN["rewards"]


def double(**options):
    with jax.enable_x64(True):
        return np.asarray(grpo.advantages(jnp.asarray(REWARDS), jnp.asarray(IDS), GROUPS, **options))


def single(rewards=REWARDS, ids=IDS, groups=GROUPS, **options):
    return grpo.advantages(jnp.asarray(rewards, jnp.float32), jnp.asarray(ids), groups, **options)


def test_advantages_equal_flow_grpo():
    np.testing.assert_allclose(double(clip=np.inf), GOLDEN["adv_global_std"], **DOUBLE)
    np.testing.assert_allclose(double(), GOLDEN["adv_clipped"], **DOUBLE)
    np.testing.assert_allclose(double(scope="group", clip=np.inf), GOLDEN["adv_group_std"], **DOUBLE)


def test_advantages_equal_dance_grpo_up_to_its_degrees_of_freedom():
    """With ddof 1 the std is sqrt(n / (n-1)) times ours, and eps is 1e-8."""
    with jax.enable_x64(True):
        counts = np.bincount(IDS)[IDS]
        factor = np.sqrt((counts - 1) / counts)
        ours = double(scope="group", eps=1e-8 * factor, clip=np.inf) * factor
    # Its array is float32: 1e-6 relative, and the constant group there is 1e-8 / 1e-8 away from 0 at most.
    np.testing.assert_allclose(ours, GOLDEN["adv_dance_group"], rtol=2e-6, atol=2e-6)


def test_zero_std_ratio_equals_flow_grpo():
    ratio = grpo.zero_std_ratio(jnp.asarray(REWARDS, jnp.float32), jnp.asarray(IDS), GROUPS)
    assert float(ratio) == pytest.approx(float(GOLDEN["zero_std_ratio"]), rel=1e-6)


def test_zero_std_ratio_ignores_failed_rewards_and_empty_groups():
    rewards = jnp.array([1.0, 9.0, 1.0, 2.0, 3.0, jnp.nan])
    ids = jnp.array([0, 0, 0, 1, 1, 2])
    ok = jnp.array([True, False, True, True, True, False])
    assert float(grpo.zero_std_ratio(rewards, ids, 5, ok)) == 0.5
    assert float(grpo.zero_std_ratio(rewards, ids, 5, jnp.zeros(6, bool))) == 0


@pytest.mark.parametrize("scope", grpo.SCOPES)
def test_a_constant_group_has_advantage_exactly_zero(scope):
    rewards = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.7])
    a = single(rewards, np.array([0, 0, 0, 0, 0, 1, 1], np.int32), 2, scope=scope)
    assert (a[:5] == 0).all() and a[5] < 0 < a[6]


@pytest.mark.parametrize("scope", grpo.SCOPES)
def test_failed_rewards_leave_every_statistic_alone(scope):
    ok = np.arange(len(IDS)) % 4 != 1
    broken = np.where(ok, REWARDS, np.nan)
    a = single(broken, scope=scope, ok=jnp.asarray(ok))
    assert (a[~ok] == 0).all()
    kept = single(REWARDS[ok], IDS[ok], scope=scope)
    np.testing.assert_allclose(a[ok], kept, rtol=1e-5, atol=1e-6)


def test_all_failed_gives_zero_and_no_nan():
    assert (single(np.full(30, np.nan), ok=jnp.zeros(30, bool)) == 0).all()


@pytest.mark.parametrize("scope", grpo.SCOPES)
def test_advantages_of_a_group_sum_to_zero_and_know_no_order(scope):
    a = single(scope=scope, clip=np.inf)
    np.testing.assert_allclose(jax.ops.segment_sum(a, jnp.asarray(IDS), GROUPS), 0, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(IDS))
    np.testing.assert_allclose(
        single(REWARDS[order], IDS[order], scope=scope, clip=np.inf), a[order], atol=1e-6
    )


def test_within_scope_ignores_what_differs_between_groups():
    far = REWARDS + 10.0 * IDS
    # Adding 40 to a float32 reward costs six bits: 4e-6 of a reward, 1e-4 of an advantage.
    np.testing.assert_allclose(single(far, scope="within"), single(scope="within"), atol=3e-4)
    assert np.abs(single(far, scope="global")).max() < 0.2 * np.abs(single(scope="global")).max()


def test_advantages_are_the_same_inside_jit():
    jitted = jax.jit(grpo.advantages, static_argnums=2, static_argnames=("scope",))
    np.testing.assert_allclose(jitted(jnp.asarray(REWARDS, jnp.float32), IDS, GROUPS), single(), rtol=1e-5)


def test_per_reward_advantages_do_not_depend_on_a_rewards_scale():
    other = np.random.default_rng(1).normal(size=30)
    both = lambda s: grpo.advantages_per_reward(
        {"a": jnp.asarray(REWARDS, jnp.float32), "b": jnp.asarray(other * s, jnp.float32)},
        {"a": 1.0, "b": 0.5}, jnp.asarray(IDS), GROUPS, eps=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(both(1.0), both(1000.0), rtol=1e-4, atol=1e-5)
    expected = single(clip=np.inf, eps=0.0) + 0.5 * single(other, clip=np.inf, eps=0.0)
    np.testing.assert_allclose(both(1.0), np.clip(expected, -5, 5), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="weights"):
        grpo.advantages_per_reward({"a": jnp.ones(30)}, {"c": 1.0}, jnp.asarray(IDS), GROUPS)


@pytest.mark.parametrize("tag", ["1e-4", "1e-5", "0.2"])
def test_ppo_loss_gradient_and_metrics_equal_flow_grpo(tag):
    old, new = (jnp.asarray(GOLDEN[k]) for k in ("lp_old", f"lp_new_{tag}"))
    a = jnp.asarray(GOLDEN["adv_clipped"], jnp.float32)
    clip = float(tag)
    (loss, metrics), grad = jax.value_and_grad(grpo.ppo_loss, has_aux=True)(new, old, a, clip)
    close = dict(
        rtol=1e-5, atol=2e-7
    )  # float32 exp of a log-ratio: 1 unit in the last place of 1, times A = 5
    np.testing.assert_allclose(jnp.exp(new - old), GOLDEN[f"ratio_{tag}"], atol=1e-6)
    np.testing.assert_allclose(loss, GOLDEN[f"loss_{tag}"], **close)
    np.testing.assert_allclose(grad, GOLDEN[f"grad_lp_new_{tag}"], **close)
    per_sample = jax.vmap(lambda n, o, a: grpo.ppo_loss(n, o, a, clip)[0])(new, old, a)
    np.testing.assert_allclose(per_sample, GOLDEN[f"loss_per_sample_{tag}"], rtol=1e-5, atol=1e-6)
    assert float(metrics["clip_fraction"]) == pytest.approx(float(GOLDEN[f"clipfrac_{tag}"]))
    assert float(metrics["clip_fraction_high"]) == pytest.approx(float(GOLDEN[f"clipfrac_gt_{tag}"]))
    assert float(metrics["clip_fraction_low"]) == pytest.approx(float(GOLDEN[f"clipfrac_lt_{tag}"]))
    np.testing.assert_allclose(metrics["approx_kl"], GOLDEN[f"approx_kl_{tag}"], rtol=1e-5)


def test_ratio_is_one_before_the_first_update():
    lp = jnp.asarray(GOLDEN["lp_old"])
    loss, metrics = grpo.ppo_loss(lp, lp, jnp.asarray(GOLDEN["adv_clipped"], jnp.float32), 1e-4)
    assert metrics["ratio_max_error"] == 0 and metrics["clip_fraction"] == 0
    assert float(loss) == pytest.approx(-GOLDEN["adv_clipped"].mean(), abs=1e-6)


@pytest.mark.parametrize("shape", [(30,), (10, 3)])
def test_masked_elements_change_neither_loss_nor_gradient(shape):
    old, new = (GOLDEN[k] for k in ("lp_old", "lp_new_0.2"))
    a = GOLDEN["adv_clipped"].astype(np.float32)
    keep = np.arange(30) % 3 != 0
    broken = [jnp.asarray(np.where(keep, z, bad), jnp.float32).reshape(shape) for z, bad in
              ((new, np.nan), (old, 7.0), (a, 1e9))]  # fmt: skip
    weight = jnp.asarray(keep, jnp.float32).reshape(shape)
    run = jax.value_and_grad(lambda n, o, a, w: grpo.ppo_loss(n, o, a, 0.2, w), has_aux=True)
    (loss, metrics), grad = run(*broken, weight)
    (expected, known), g = run(*(jnp.asarray(z[keep], jnp.float32) for z in (new, old, a)), None)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad.ravel()[keep], g, rtol=1e-5, atol=1e-8)
    assert (grad.ravel()[~keep] == 0).all()
    for name in known:
        np.testing.assert_allclose(metrics[name], known[name], rtol=1e-5)


def test_a_step_weight_scales_the_loss_and_all_masked_is_zero():
    old, new = (jnp.asarray(GOLDEN[k]) for k in ("lp_old", "lp_new_0.2"))
    a = jnp.asarray(GOLDEN["adv_clipped"], jnp.float32)
    loss, _ = grpo.ppo_loss(new, old, a, 0.2)
    np.testing.assert_allclose(grpo.ppo_loss(new, old, a, 0.2, jnp.full(30, 3.0))[0], 3 * loss, rtol=1e-5)
    loss, metrics = grpo.ppo_loss(new, old, a, 0.2, jnp.zeros(30))
    assert all(float(z) == 0 for z in (loss, *metrics.values()))


def test_guard_ratio_is_the_mean_of_noise_times_drift():
    keys = jax.random.split(jax.random.key(0), 3)
    mean, noise, delta = (jax.random.normal(k, (4, 3, 3, 2)) for k in keys)
    delta, std = 1e-3 * delta, jnp.array([0.1, 0.5, 1.0, 2.0])
    sb = std[:, None, None, None]
    x_next = mean + sb * noise
    lp = lambda m: (-0.5 * ((x_next - m) / sb) ** 2 - jnp.log(sb)).mean((1, 2, 3))
    log_ratio = grpo.guard_log_ratio(lp(mean + delta), lp(mean), mean + delta, mean, std)
    # The two log-probs are near 1 and differ by 1e-4: float32 leaves 2e-7 of it, times std.
    np.testing.assert_allclose(log_ratio, (noise * delta).mean((1, 2, 3)), atol=1e-6)
    column = grpo.guard_log_ratio(
        jnp.stack([lp(mean + delta)] * 2, 1), jnp.stack([lp(mean)] * 2, 1), mean + delta, mean, sb
    )
    np.testing.assert_array_equal(column, jnp.stack([log_ratio] * 2, 1))


def test_guard_loss_is_the_clipped_surrogate_on_its_ratio_and_survives_std_zero():
    lp_old, lp = jnp.array([0.1, 0.2, 0.0]), jnp.array([0.1002, 0.1999, 0.0])
    mean = jax.random.normal(jax.random.key(1), (3, 5))
    old, std, a = mean + 1e-3, jnp.array([0.5, 1.0, 0.0]), jnp.array([1.0, -2.0, 3.0])

    def loss(lp, mean):
        return grpo.guard_loss(lp, lp_old, mean, old, std, a, 2e-6)

    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(lp, mean)
    rho = jnp.exp(grpo.guard_log_ratio(lp, lp_old, mean, old, std))
    expected = jnp.maximum(-a * rho, -a * jnp.clip(rho, 1 - 2e-6, 1 + 2e-6)).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert rho[2] == 1 and float(metrics["clip_fraction"]) == pytest.approx(2 / 3)
    assert all(jnp.isfinite(g).all() for g in grads)


def test_an_unknown_scope_names_the_nearest():
    with pytest.raises(ValueError, match='try "group"'):
        single(scope="groups")
