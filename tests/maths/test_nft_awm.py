import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_arrays import DOUBLE, load, nhwc

from smart_grpo_jax.maths import awm, nft

GOLDEN = load("variants")
LATENTS = ("v_new", "v_old", "v_ref", "x0", "eps")


def inputs(dtype):
    return [jnp.asarray(nhwc(GOLDEN[k]), dtype) for k in LATENTS] + [
        jnp.asarray(GOLDEN[k], dtype) for k in ("t", "adv")
    ]


# The published code mixes velocities and forms x_t in float32 before it turns to float64.
MIXED = dict(rtol=3e-7)


@pytest.mark.parametrize("beta", [1, 0.1])
def test_nft_terms_equal_the_published_ones(beta):
    with jax.enable_x64(True):
        v, v_old, _, x0, eps, t, a = inputs(jnp.float64)
        terms = nft.terms(v, v_old, x0, eps, t, a, beta=beta)
        np.testing.assert_allclose(terms.r, GOLDEN["nft_r"], rtol=1e-6)
        np.testing.assert_allclose(terms.positive, GOLDEN[f"nft_pos_b{beta}"], **MIXED)
        np.testing.assert_allclose(terms.negative, GOLDEN[f"nft_neg_b{beta}"], **MIXED)
        np.testing.assert_allclose(terms.policy, GOLDEN[f"nft_policy_b{beta}"], **MIXED)
        x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * eps
        np.testing.assert_allclose(x_t, nhwc(GOLDEN["x_t"]), atol=5e-7)


@pytest.mark.parametrize("beta", [1, 0.1])
def test_nft_loss_and_kl_equal_the_published_ones(beta):
    args = inputs(jnp.float32)
    loss, metrics = nft.loss(*args, beta=beta)
    np.testing.assert_allclose(loss, GOLDEN[f"nft_loss_b{beta}"], rtol=2e-6)  # float32 all through
    np.testing.assert_allclose(metrics["kl"], GOLDEN["nft_kl"].mean(), rtol=1e-5)
    with_kl, _ = nft.loss(*args, beta=beta, kl_weight=2.0)
    np.testing.assert_allclose(with_kl - loss, 2 * GOLDEN["nft_kl"].mean(), rtol=1e-3)  # of a difference


def test_nft_pulls_towards_good_images_and_away_from_bad_ones():
    v, _, v_ref, x0, eps, t, _ = inputs(jnp.float32)
    slope = lambda a: jax.grad(lambda v_: nft.loss(v_, v, v_ref, x0, eps, t, a)[0])(v)
    good, even, bad = (slope(jnp.full(6, a)) for a in (5.0, 0.0, -5.0))
    towards = (eps - x0) - v
    assert (jnp.sum(good * towards, (1, 2, 3)) < 0).all() and (jnp.sum(bad * towards, (1, 2, 3)) > 0).all()
    # On-policy the two pulls are mirror images, so an average image moves nothing.
    np.testing.assert_allclose(good, -bad, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(even, 0, atol=1e-7)


def test_nft_takes_no_gradient_through_the_old_policy():
    v, v_old, v_ref, x0, eps, t, a = inputs(jnp.float32)
    assert not jax.grad(lambda o: nft.loss(v, o, v_ref, x0, eps, t, a)[0])(v_old).any()


@pytest.mark.parametrize("name", ["uniform", "t", "t2", "huber", "ghuber"])
def test_awm_log_probs_equal_the_published_ones(name):
    column = "ghuber025" if name == "ghuber" else name
    for policy, tag in ((0, "new"), (1, "old")):
        args = inputs(jnp.float32)
        lp = awm.log_prob(args[policy], args[3], args[4], args[5], name)
        np.testing.assert_allclose(lp, GOLDEN[f"awm_logp_{tag}_{column}"], rtol=2e-6)  # float32
        with jax.enable_x64(True):
            v, t = (
                jnp.asarray(nhwc(GOLDEN[LATENTS[policy]]), jnp.float64),
                jnp.asarray(GOLDEN["t"], jnp.float64),
            )
            # Its target eps - x0 is rounded to float32; the rest is float64.
            target = jnp.asarray(nhwc(GOLDEN["eps"] - GOLDEN["x0"]), jnp.float64)
            lp = awm.log_prob(v, jnp.zeros_like(target), target, t, name)
            np.testing.assert_allclose(lp, GOLDEN[f"awm_logp_{tag}_{column}"], **DOUBLE)


def test_awm_table_is_complete():
    assert set(awm.WEIGHTS) == {"uniform", "t", "t2", "huber", "ghuber"}
    with pytest.raises(ValueError, match='try "huber"'):
        awm.log_prob(*(jnp.ones((1, 2)),) * 3, jnp.ones(1), "hubber")


def test_awm_is_a_policy_gradient_on_the_matching_loss():
    v, _, v_ref, x0, eps, t, a = inputs(jnp.float32)
    grad = jax.grad(lambda v_: awm.loss(v_, v, v_ref, x0, eps, t, a, weighting="t")[0])(v)
    by_hand = jax.grad(lambda v_: -(a * awm.log_prob(v_, x0, eps, t, "t")).mean())(v)
    np.testing.assert_allclose(grad, by_hand, rtol=1e-4, atol=1e-7)


def test_awm_clips_and_adds_the_velocity_kl():
    v, v_old, v_ref, x0, eps, t, a = inputs(jnp.float32)
    ratio = jnp.exp(awm.log_prob(v, x0, eps, t) - awm.log_prob(v_old, x0, eps, t))
    expected = (
        jnp.maximum(-a * ratio, -a * jnp.clip(ratio, 0.999, 1.001)).mean() + 3 * GOLDEN["nft_kl"].mean()
    )
    loss, metrics = awm.loss(v, v_old, v_ref, x0, eps, t, a, clip=1e-3, kl_weight=3.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert 0 < float(metrics["clip_fraction"]) < 1
    assert float(metrics["kl"]) == pytest.approx(float(GOLDEN["nft_kl"].mean()), rel=1e-5)


@pytest.mark.parametrize("loss", [nft.loss, awm.loss])
def test_masked_images_change_neither_loss_nor_gradient(loss):
    args = inputs(jnp.float32)
    keep = jnp.array([1.0, 0, 1, 1, 0, 1])
    kept = np.flatnonzero(keep)
    value, grad = jax.value_and_grad(lambda v: loss(v, *args[1:], weight=keep, kl_weight=0.1)[0])(args[0])
    fewer = [a[kept] for a in args]
    known, known_grad = jax.value_and_grad(lambda v: loss(v, *fewer[1:], kl_weight=0.1)[0])(fewer[0])
    np.testing.assert_allclose(value, known, rtol=1e-5)
    np.testing.assert_allclose(grad[kept], known_grad, rtol=1e-4, atol=1e-8)
    assert not grad[1].any() and not grad[4].any()
