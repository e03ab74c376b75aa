import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.maths import credit, grpo

T, P, G = 4, 3, 6
IDS = jnp.repeat(jnp.arange(P), G)
RNG = np.random.default_rng(0)
REWARDS = jnp.asarray(RNG.normal(size=P * G) + np.repeat([0.0, 1.0, 3.0], G), jnp.float32)
STEPS = jnp.array([False, True, True, False])
HALF = jnp.arange(P * G) % 2 == 0
SEARCHED = np.asarray(STEPS)[:, None] & np.asarray(HALF)


def assign(kind, rewards=REWARDS, members=HALF, one_step=None, offset=0.0, **options):
    return np.asarray(credit.assign(kind, rewards, IDS, P, STEPS, members, one_step, offset, **options))


def test_none_is_the_advantage_of_the_finished_image_at_every_step():
    a = assign("none", scope="group")
    np.testing.assert_array_equal(a, np.stack([grpo.advantages(REWARDS, IDS, P, scope="group")] * T))


def test_offset_is_added_at_searched_transitions_only():
    np.testing.assert_allclose(assign("offset", offset=1.5) - assign("none"), 1.5 * SEARCHED, atol=1e-6)
    np.testing.assert_array_equal(assign("offset", offset=0.0), assign("none"))


def test_offset_is_not_given_to_failed_images():
    ok = jnp.arange(P * G) != 2
    assert (assign("offset", offset=1.0, ok=ok)[:, 2] == 0).all()


def split_reference(rewards, clip=5.0):
    """Reward minus the mean of the unsearched half, or of the own half; over the std of the latter."""
    g, s = np.asarray(rewards, np.float64).reshape(P, G), np.asarray(HALF).reshape(P, G)[0]
    plain = g[:, ~s].mean(1, keepdims=True)
    own = np.where(s, g - g[:, s].mean(1, keepdims=True), g - plain)
    judged = np.where(SEARCHED.reshape(T, P, G), g - plain, own)
    return np.clip(judged / (own.std() + 1e-4), -clip, clip).reshape(T, P * G)


def test_split_judges_each_part_as_described():
    np.testing.assert_allclose(assign("split"), split_reference(REWARDS), rtol=1e-4, atol=1e-5)


def test_split_credits_the_gain_of_the_search_where_it_was_made_and_nowhere_else():
    gained = REWARDS + 2.0 * HALF
    before, after = assign("split", clip=np.inf), assign("split", rewards=gained, clip=np.inf)
    # The same everywhere else; at searched transitions more by one and the same amount.
    np.testing.assert_allclose(after[~SEARCHED], before[~SEARCHED], atol=1e-4)
    gain = (after - before)[SEARCHED]
    assert gain.min() > 1 and np.ptp(gain) < 1e-4
    # The paper's way gives it to every step of the searched image.
    spread = assign("none", rewards=gained) - assign("none")
    assert (spread[:, np.asarray(HALF)] > 0.1).all()


def test_split_in_group_scope_uses_the_groups_std():
    a = assign("split", scope="group", clip=np.inf)
    scaled = assign("split", rewards=REWARDS * jnp.where(IDS == 1, 10.0, 1.0), scope="group", clip=np.inf)
    np.testing.assert_allclose(a, scaled, atol=2e-3)  # eps = 1e-4 against a std of 0.5..10


def test_split_without_an_unsearched_part_compares_with_its_own():
    everyone = jnp.ones(P * G, bool)
    a = assign("split", members=everyone)
    np.testing.assert_allclose(a, np.stack([grpo.advantages(REWARDS, IDS, P, scope="within")] * T), rtol=1e-5)


def test_split_ignores_failed_rewards():
    ok = np.arange(P * G) != 3  # an unsearched one
    broken = jnp.where(jnp.asarray(ok), REWARDS, jnp.nan)
    a = assign("split", rewards=broken, ok=jnp.asarray(ok))
    assert np.isfinite(a).all() and (a[:, 3] == 0).all()
    plain = np.asarray(REWARDS)[[1, 5]].mean()
    own = (REWARDS[0] - np.asarray(REWARDS)[[0, 2, 4]].mean()) / a[0, 0]
    assert (REWARDS[0] - plain) / a[1, 0] == pytest.approx(float(own), rel=1e-4)


ONE_STEP = jnp.asarray(RNG.normal(size=(T + 1, P * G)), jnp.float32)


def test_difference_is_centred_in_the_group_and_scaled_per_step():
    a = assign("difference", one_step=ONE_STEP, scope="within")
    gain = np.diff(np.asarray(ONE_STEP), axis=0).reshape(T, P, G)
    centred = gain - gain.mean(2, keepdims=True)
    expected = centred / (centred.std((1, 2), keepdims=True) + 1e-4)
    np.testing.assert_allclose(a, expected.reshape(T, -1), rtol=1e-4, atol=1e-5)


def test_difference_does_not_see_the_final_reward_nor_other_steps():
    a = assign("difference", one_step=ONE_STEP)
    np.testing.assert_array_equal(a, assign("difference", rewards=REWARDS * 7, one_step=ONE_STEP))
    later = assign("difference", one_step=ONE_STEP.at[3:].add(RNG.normal(size=P * G)))
    np.testing.assert_array_equal(a[:2], later[:2])
    assert (a[2] != later[2]).any()


def test_difference_leaves_out_steps_without_a_score():
    a = assign("difference", one_step=ONE_STEP.at[2, 5].set(jnp.nan))
    assert np.isfinite(a).all()
    assert (a[1:3, 5] == 0).all() and a[0, 5] != 0 and a[3, 5] != 0
    np.testing.assert_array_equal(a[[0, 3]], assign("difference", one_step=ONE_STEP)[[0, 3]])


def test_difference_needs_one_step_rewards():
    with pytest.raises(ValueError, match="one-step rewards"):
        assign("difference")


def test_local_makes_each_state_a_group():
    rewards = jnp.asarray(RNG.normal(size=(5, 4)) + 10 * np.arange(5)[:, None], jnp.float32)
    a = np.asarray(credit.local(rewards))
    centred = np.asarray(rewards) - np.asarray(rewards).mean(1, keepdims=True)
    np.testing.assert_allclose(a, centred / (centred.std() + 1e-4), rtol=1e-4, atol=1e-5)
    per_state = np.asarray(credit.local(rewards, scope="group"))
    np.testing.assert_allclose(per_state.std(1), 1, atol=1e-3)


def test_local_gives_nothing_to_a_candidate_without_a_score():
    rewards = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)
    a = credit.local(rewards.at[0, 1].set(jnp.nan), ok=jnp.ones((2, 4), bool).at[1, 3].set(False))
    assert a[0, 1] == 0 and a[1, 3] == 0 and jnp.isfinite(a).all()
    assert float(jnp.abs(a.sum(1)).max()) < 1e-5


def test_the_table_holds_the_five_ways_and_names_the_nearest():
    assert set(credit.CREDITS) == {"none", "offset", "split", "local", "difference"}
    with pytest.raises(ValueError, match='try "split"'):
        assign("splits")
