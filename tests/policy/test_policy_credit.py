from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

from smart_grpo_jax.core.types import Endpoints
from smart_grpo_jax.jobs import record
from smart_grpo_jax.policy import credit

KINDS = ["none", "offset", "split", "difference", "local"]


def rollout(kind="none", groups=toy.GROUPS):
    shape = toy.shape(
        searched_members=2 if kind == "split" else toy.MEMBERS,
        one_step_rewards=kind == "difference",
        stop=3 if kind == "local" else toy.STEPS,
    )
    knobs = toy.knobs(searched=[1, 2], keep_candidates=kind == "local")
    return shape, toy.act(shape, knobs, toy.batch(groups))


def experience(kind, shape, acted, masks=None, **rule):
    trained = np.array([1, 2]) if kind == "local" else None
    masks = masks or toy.masks(searched=(1, 2), trained=trained)
    return toy.experience(credit.Rule(kind=kind, **rule), shape, acted, masks)


def failing(acted):
    """The same rollout with every second image, and every third candidate, without a reward."""
    ok = jnp.arange(acted.ok.size) % 2 == 0
    found = acted.found
    if found is not None:
        lost = jnp.arange(found.rewards.size).reshape(found.rewards.shape) % 3 == 0
        found = found._replace(rewards=jnp.where(lost, jnp.nan, found.rewards))
    return acted._replace(ok=ok, reward=jnp.where(ok, acted.reward, jnp.nan), found=found)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_bring_their_trained_steps_in_order(kind):
    shape, acted = rollout(kind)
    found = experience(kind, shape, acted)
    steps, moves = (2, 8) if kind == "local" else (toy.STEPS - 1, 1)
    images = toy.GROUPS * toy.MEMBERS
    assert found.x.shape == (images, steps, *toy.LATENT)
    assert found.x_next.shape == (images, steps, moves, *toy.LATENT)
    assert found.advantage.shape == found.weight.shape == found.log_prob.shape == (images, steps, moves)
    first = 1 if kind == "local" else 0
    assert np.array_equal(found.step[0], np.arange(first, first + steps))
    assert np.array_equal(found.row[:, 0], np.repeat(np.arange(toy.GROUPS), toy.MEMBERS))
    assert np.array_equal(found.x[:, 0], acted.x[first])
    if kind != "local":
        assert np.array_equal(found.x_next[:, :, 0], np.swapaxes(acted.x_next, 0, 1)[:, :steps])


@pytest.mark.parametrize("kind", ["none", "offset", "split", "difference"])
def test_a_failed_image_weighs_nothing_at_any_step(kind):
    shape, acted = rollout(kind)
    acted = failing(acted)
    failed = ~np.asarray(acted.ok)
    found = experience(kind, shape, acted)
    assert np.all(found.weight[failed] == 0) and np.all(found.advantage[failed] == 0)
    assert np.isfinite(np.asarray(found.advantage)).all() and np.any(found.weight[~failed] == 1)


def test_a_failed_candidate_weighs_nothing_and_its_neighbours_stay():
    shape, acted = rollout("local")
    acted = failing(acted)
    found = experience("local", shape, acted)
    rewards = np.swapaxes(np.asarray(acted.found.rewards)[[1, 2]], 0, 1).reshape(found.weight.shape)
    failed = np.isnan(rewards)
    assert 0 < failed.sum() < failed.size
    assert np.all(np.asarray(found.weight)[failed] == 0) and np.any(np.asarray(found.weight)[~failed] == 1)
    assert np.isfinite(np.asarray(found.advantage)).all()


def first_groups(acted, count):
    """The rollout of the first groups alone."""

    def cut(name, leaf):
        axis = int(name in record.PATHS)
        return jnp.take(leaf, np.arange(leaf.shape[axis] // 4 * count), axis)

    return type(acted)(*(jax.tree.map(partial(cut, name), getattr(acted, name)) for name in acted._fields))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_weighs_nothing_and_changes_no_other_advantage(kind):
    shape, acted = rollout(kind, groups=4)
    trained = np.array([1, 2]) if kind == "local" else None
    real = np.array([True, True, True, False])
    padded = experience(kind, shape, acted, toy.masks((1, 2), trained, real=real))
    assert np.all(padded.weight[3 * toy.MEMBERS :] == 0)
    few = first_groups(acted, 3)
    plain = experience(kind, shape, few, toy.masks((1, 2), trained))
    # sums over groups of another number of rows
    np.testing.assert_allclose(padded.advantage[: 3 * toy.MEMBERS], plain.advantage, atol=1e-5)
    assert np.array_equal(padded.weight[: 3 * toy.MEMBERS], plain.weight)


def test_a_group_without_a_difference_is_left_out():
    shape, acted = rollout("none")
    found = experience("none", shape, acted._replace(reward=acted.reward.at[: toy.MEMBERS].set(0.5)))
    assert np.all(found.weight[: toy.MEMBERS] == 0) and np.all(found.weight[toy.MEMBERS :] == 1)


def test_the_offset_is_added_at_searched_steps_alone():
    shape, acted = rollout("offset")
    plain = experience("none", shape, acted)
    moved = experience("offset", shape, acted, toy.masks(searched=(1, 2), offset=0.5))
    gain = np.asarray(moved.advantage - plain.advantage)[..., 0]
    np.testing.assert_allclose(gain, np.broadcast_to([0, 0.5, 0.5, 0], gain.shape), atol=1e-6)


def test_local_candidates_compete_within_their_state_only():
    shape, acted = rollout("local")
    found = experience("local", shape, acted)
    np.testing.assert_allclose(np.asarray(found.advantage).mean(-1), 0, atol=1e-5)
    rewards = np.swapaxes(np.asarray(acted.found.rewards)[[1, 2]], 0, 1).reshape(found.advantage.shape)
    assert np.array_equal(np.argmax(rewards, -1), np.argmax(found.advantage, -1))


def test_likelihood_free_losses_learn_from_finished_images():
    shape, acted = rollout("none")
    found = experience("none", shape, acted, likelihood=False)
    assert isinstance(found, Endpoints) and np.array_equal(found.x0, acted.x0)
    assert np.array_equal(found.advantage, experience("none", shape, acted).advantage[:, 0, 0])


def test_rewards_normalised_one_by_one_ignore_their_scale():
    shape, acted = rollout("none")
    other = jax.random.uniform(jax.random.key(3), acted.reward.shape)
    rule = {"combine": "normalise", "weights": (("toy", 1.0), ("other", 0.5))}
    small = experience("none", shape, acted._replace(parts=acted.parts | {"other": other}), **rule)
    large = experience("none", shape, acted._replace(parts=acted.parts | {"other": 1000 * other}), **rule)
    # the 1e-4 that guards the division matters less for the larger scale
    np.testing.assert_allclose(small.advantage, large.advantage, atol=2e-3)


def test_the_summary_counts_failures_and_leaves_padding_out():
    shape, acted = rollout("none", groups=4)
    acted = failing(acted)._replace(found=acted.found)
    rule = credit.Rule()
    masks = toy.masks((1, 2), real=[True, True, False, False])
    told = credit.summary(rule, shape, acted, masks)
    ok, reward = np.asarray(acted.ok)[: 2 * toy.MEMBERS], np.asarray(acted.reward)[: 2 * toy.MEMBERS]
    np.testing.assert_allclose(told["train/failed"], 1 - ok.mean(), atol=1e-6)
    np.testing.assert_allclose(told["train/reward"], reward[ok].mean(), atol=1e-6)
    per_round = np.asarray(acted.found.rewards)[1, : 2 * toy.MEMBERS].mean((0, 2))
    np.testing.assert_allclose(told["search/step_1/last"], per_round[-1], atol=1e-5)
    assert np.isnan(told["search/step_0/last"])
