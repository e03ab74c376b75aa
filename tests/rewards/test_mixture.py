"""How several rewards order the candidates of one state."""

import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core.types import Scores
from smart_grpo_jax.rewards import mixture

WIDE = jnp.array([10.0, 30.0, 20.0, 0.0])
NARROW = jnp.array([0.8, 0.1, 0.9, 0.3])


def scores(ok=(True, True, True, True)) -> Scores:
    ok = jnp.array(ok)
    value = jnp.where(ok, WIDE + NARROW, jnp.nan)
    return Scores(value, ok, {"wide": WIDE, "narrow": NARROW, "seen": 1e6 * NARROW})


SPEC = {"wide": 1.0, "narrow": {"weight": 1.0}, "seen": 0.0}


def test_the_raw_sum_follows_the_reward_of_the_widest_spread():
    assert int(jnp.argmax(mixture.prefer(SPEC, "sum")(scores()))) == 1


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_scaled_rewards_decide_together_whatever_their_units(kind):
    order = mixture.prefer(SPEC, kind)
    assert int(jnp.argmax(order(scores()))) == 2
    stretched = scores()._replace(parts={"wide": WIDE, "narrow": 1e-3 * NARROW + 7, "seen": NARROW})
    np.testing.assert_allclose(order(stretched), order(scores()), atol=1e-3)


def test_ranks_are_shared_by_equal_candidates():
    even = Scores(jnp.zeros(3), jnp.ones(3, bool), {"a": jnp.array([1.0, 1.0, 0.0])})
    np.testing.assert_array_equal(mixture.prefer({"a": 1.0}, "rank")(even), [1.5, 1.5, 0.0])


@pytest.mark.parametrize("kind", ["zscore", "rank"])
def test_a_failed_candidate_does_not_move_the_others(kind):
    without = scores((True, False, True, True))
    broken = without._replace(parts={"wide": WIDE.at[1].set(jnp.nan), "narrow": NARROW, "seen": NARROW})
    keep = np.array([0, 2, 3])
    other = Scores(*(np.asarray(a)[keep] for a in (without.value, without.ok)), {})
    other = other._replace(parts={"wide": WIDE[keep], "narrow": NARROW[keep]})
    order = mixture.prefer(SPEC, kind)
    np.testing.assert_allclose(order(broken)[keep], order(other), atol=1e-6)


def test_a_reward_that_cannot_tell_candidates_apart_says_nothing():
    flat = Scores(jnp.zeros(4), jnp.ones(4, bool), {"wide": WIDE, "narrow": jnp.full(4, 3.0)})
    order = mixture.prefer({"wide": 1.0, "narrow": 5.0}, "zscore")(flat)
    assert np.isfinite(order).all()
    assert int(jnp.argmax(order)) == 1
