import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

from smart_grpo_jax.core.types import Endpoints
from smart_grpo_jax.maths import rng
from smart_grpo_jax.policy import credit, losses, update


@functools.cache
def experience(kind="none", transition="flow", likelihood=True, log_prob="gaussian"):
    """One scored rollout of the toy, as the update takes it."""
    local = kind == "local"
    members = toy.MEMBERS if local or transition == "flow" else 0
    shape = toy.shape(
        transition=transition, stop=3 if local else toy.STEPS, log_prob=log_prob, searched_members=members
    )
    acted = toy.act(shape, toy.knobs(searched=[1, 2] if local else [], keep_candidates=local))
    masks = toy.masks(searched=[1, 2] if local else [], trained=[1, 2] if local else None)
    return toy.experience(credit.Rule(kind=kind, likelihood=likelihood), shape, acted, masks)


def state(recipe=None, trained=None):
    return update.init_state(recipe or toy.recipe(), toy.weights() if trained is None else trained)


def moved(scale=0.05):
    return jax.tree.map(lambda w, n: w + scale * n, toy.weights(), toy.weights(1))


@pytest.mark.parametrize("transition", ["flow", "dance", "cps"])
@pytest.mark.parametrize("loss", ["ppo", "guard"])
def test_the_ratio_is_one_before_the_first_update(transition, loss):
    given = experience(transition=transition)
    recipe = toy.recipe(transition=transition, loss=loss)
    _, metrics = toy.learn(recipe, state(recipe), given)
    assert metrics["first_ratio_error"] <= 1e-6
    _, metrics = toy.learn(recipe, state(recipe, moved()), given)
    assert metrics["first_ratio_error"] > 1e-4  # the check can fail


@pytest.mark.parametrize("log_prob", ["gaussian", "unnormalised"])
def test_the_ratio_of_every_candidate_is_one_before_the_first_update(log_prob):
    given = experience("local", log_prob=log_prob)
    recipe = toy.recipe(log_prob=log_prob)
    _, metrics = toy.learn(recipe, state(recipe), given)
    assert metrics["first_ratio_error"] <= 1e-6
    _, metrics = toy.learn(recipe, state(recipe, moved()), given)
    assert metrics["first_ratio_error"] > 1e-4


def test_steps_and_epochs_are_counted():
    recipe = toy.recipe(updates=2, passes=3)
    new, _ = toy.learn(recipe, state(recipe), experience())
    assert (int(new.step), int(new.epoch)) == (6, 1)
    assert {k: int(v) for k, v in new.counters.items()} == {"skipped": 0, "skipped_in_a_row": 0}


LOSSES = {
    "ppo": {},
    "guard": {},
    "nft": {"likelihood": False},
    "awm": {"likelihood": False},
}


def loss_of(recipe, given, trained, old, knobs):
    """The loss on the whole fixed batch, with the same fresh noise each time."""
    flat, draw = update._flatten(given), losses.draw(given, jax.random.key(5))
    fn = jax.jit(
        lambda p, o: losses.LOSSES[recipe.loss](
            toy.policy(), recipe, p, o, toy.weights(), toy.batch().cond, flat, draw, knobs
        )[0]
    )
    return float(fn(trained, old))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_goes_down_on_a_fixed_batch(loss):
    given = experience(**LOSSES[loss])
    if isinstance(given, Endpoints):  # many rows: what they draw is noise
        given = jax.tree.map(lambda a: jax.numpy.concatenate([a] * 32), given)
    recipe = toy.recipe(loss=loss, updates=1, passes=30)
    knobs = toy.update_knobs(learning_rate=3e-3, clip=0.2)
    start = state(recipe)
    new, metrics = toy.learn(recipe, start, given, knobs)
    before = loss_of(recipe, given, start.params, start.params, knobs)
    after = loss_of(recipe, given, new.params, start.params, knobs)
    assert after < before - 1e-4
    assert all(np.isfinite(v) for v in metrics.values()) and int(new.counters["skipped"]) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_learning_raises_the_reward(loss):
    recipe = toy.recipe(loss=loss, updates=1, passes=40)
    knobs = toy.update_knobs(learning_rate=3e-3, clip=0.2)
    given = experience(**LOSSES[loss])
    new, _ = toy.learn(recipe, state(recipe), given, knobs)
    before, after = (
        toy.act(toy.shape(), toy.knobs(), trained=p).reward.mean() for p in (toy.weights(), new.params)
    )
    assert after > before


@pytest.mark.parametrize("kind, chunk", [("none", 4), ("none", 20), ("local", 13), ("nft", 5), ("awm", 1)])
def test_gradients_in_parts_are_the_gradient_of_the_whole(kind, chunk):
    free = kind in ("nft", "awm")
    given, trained = experience("none" if free else kind, likelihood=not free), moved()
    loss = kind if free else "ppo"
    given = given._replace(weight=given.weight.at[0].set(0.0))

    def gradient(chunk):
        parts = toy.recipe(loss=loss, chunk=chunk)
        rest = (toy.weights(), toy.weights(), toy.batch().cond, given, toy.update_knobs())
        return jax.jit(lambda s: update._gradient(toy.policy(), parts, s, *rest))(state(trained=trained))

    (whole, told), (parts, told_parts) = gradient(0), gradient(chunk)
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(whole))
    assert size > 1e-3
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        # sums of some hundred float32 terms in another order
        np.testing.assert_allclose(a, b, atol=1e-5 * size)
    for name in told:
        np.testing.assert_allclose(told[name], told_parts[name], rtol=1e-4, atol=1e-6)


def nan_in(given, **fields):
    """The first sample's arrays, spoilt."""
    return given._replace(**{name: getattr(given, name).at[0].set(jnp.nan) for name in fields})


def test_a_gradient_that_is_not_a_number_changes_nothing_and_is_counted():
    given = nan_in(experience(), x_next=0)
    recipe = toy.recipe(updates=1)
    start = state(recipe)
    new, metrics = toy.learn(recipe, start, given)
    assert toy.same(
        (new.params, new.ema, new.opt_state, new.step), (start.params, start.ema, start.opt_state, 0)
    )
    assert {k: int(v) for k, v in new.counters.items()} == {"skipped": 1, "skipped_in_a_row": 1}
    assert all(np.isfinite(v) for v in metrics.values())
    again, _ = toy.learn(recipe, new, experience())
    assert {k: int(v) for k, v in again.counters.items()} == {"skipped": 1, "skipped_in_a_row": 0}
    assert not toy.same(again.params, start.params)


def test_only_the_update_that_met_the_nan_is_skipped():
    given = nan_in(experience(), x_next=0)
    recipe = toy.recipe(updates=2)
    new, _ = toy.learn(recipe, state(recipe), given)
    assert (int(new.step), int(new.counters["skipped"])) == (1, 1)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(new.params))


@pytest.mark.parametrize(
    "kind, fields", [("none", ("x", "x_next", "mean", "log_prob")), ("end", ("x0", "advantage"))]
)
def test_a_latent_that_diverged_but_weighs_nothing_spoils_nobody(kind, fields):
    given = experience(likelihood=kind == "none")
    recipe = toy.recipe(loss="ppo" if kind == "none" else "nft", updates=1)
    without = given._replace(weight=given.weight.at[0].set(0.0))
    spoilt = nan_in(without, **dict.fromkeys(fields))
    want, _ = toy.learn(recipe, state(recipe), without)
    new, _ = toy.learn(recipe, state(recipe), spoilt)
    assert int(new.counters["skipped"]) == 0 and toy.same(new.params, want.params)
    assert not toy.same(new.params, toy.weights())


def test_nothing_to_learn_from_changes_nothing():
    given = experience()
    recipe = toy.recipe()
    new, metrics = toy.learn(recipe, state(recipe), given._replace(weight=jnp.zeros_like(given.weight)))
    assert toy.same(new.params, toy.weights()) and float(metrics["loss"]) == 0


def test_the_average_follows_the_weights_when_it_is_due():
    recipe = toy.recipe(updates=2, ema_every=2)
    start = state(recipe)
    new, _ = toy.learn(recipe, start, experience(), toy.update_knobs(learning_rate=1e-2))
    # one average after the second step, with the warm-up's decay (1 + 1) / (10 + 1)
    decay = 2 / 11
    want = jax.tree.map(lambda old, p: decay * old + (1 - decay) * p, start.ema, new.params)
    for a, b in zip(jax.tree.leaves(new.ema), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)  # one rounding
    assert not toy.same(new.ema, start.ema) and not toy.same(new.ema, new.params)
    rare, _ = toy.learn(toy.recipe(updates=2, ema_every=3), start, experience())
    assert toy.same(rare.ema, start.ema)
    off, _ = toy.learn(recipe, start, experience(), toy.update_knobs(ema_decay=0.0))
    assert toy.same(off.ema, off.params)


@pytest.mark.parametrize("actor", ["raw", "ema"])
def test_old_is_the_policy_that_made_the_images(actor):
    """Only then is v_old what the update starts from: NFT's loss does not move with the trained weights."""
    recipe = toy.recipe(loss="nft", updates=1, actor=actor)
    start = state(recipe)._replace(params=moved(), ema=toy.weights())
    given, knobs = experience(likelihood=False), toy.update_knobs()
    told = toy.learn(recipe, start, given, knobs)[1]["loss"]
    drawn = losses.draw(given, rng.at(rng.key(knobs.seed, "update", knobs.epoch, 1), start.step))
    old = {"raw": moved(), "ema": toy.weights()}
    want = {
        name: losses.LOSSES["nft"](
            toy.policy(), recipe, moved(), weights, toy.weights(), toy.batch().cond, given, drawn, knobs
        )[0]
        for name, weights in old.items()
    }
    assert abs(want["raw"] - want["ema"]) > 1e-3
    np.testing.assert_allclose(told, want[actor], rtol=1e-4)  # the same sum, dealt in another order


def test_the_knobs_of_the_update_are_data():
    recipe = toy.recipe(use_kl=True)
    program = jax.jit(
        lambda s, e, k: update.learn(toy.policy(), recipe, s, toy.weights(), toy.batch().cond, e, k)
    )
    given, start = experience(), state(recipe)
    ends = [
        program(start, given, toy.update_knobs(**changes))[0].params
        for changes in (
            {}, {"learning_rate": 3e-3}, {"kl_weight": 10.0}, {"warmup": 100.0}, {"weight_decay": 0.5},
            {"seed": 3}, {"step_weight": np.linspace(1, 2, toy.STEPS)},
        )
    ]  # fmt: skip
    assert program._cache_size() == 1
    assert len({np.asarray(end["w"]).tobytes() for end in ends}) == len(ends)


def test_the_kl_is_zero_at_the_reference_and_holds_the_policy_near_it():
    recipe = toy.recipe(use_kl=True, updates=1, kl="exact")
    _, at_reference = toy.learn(recipe, state(recipe), experience())
    assert float(at_reference["kl"]) < 1e-12
    recipe = toy.recipe(use_kl=True, updates=1, passes=30, kl="exact")
    far, held = (
        toy.learn(recipe, state(recipe), experience(), toy.update_knobs(learning_rate=1e-2, kl_weight=w))[0]
        for w in (0.0, 100.0)
    )
    distance = lambda s: sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(
        jax.tree.leaves(s.params), jax.tree.leaves(toy.weights()), strict=True))  # fmt: skip
    assert distance(held) < 0.5 * distance(far)


def test_passes_draw_the_images_in_another_order_and_all_of_them():
    seen = []

    def spy(params, x, t, cond):
        jax.debug.callback(lambda row: seen.append(np.asarray(row)), cond.pooled[:, 0])
        return toy.velocity(params, x, t, cond)

    recipe = toy.recipe(updates=3, passes=2)
    jax.block_until_ready(toy.learn(recipe, state(recipe), experience(), policy_=toy.policy(velocity=spy)))
    jax.effects_barrier()
    batches = [tuple(rows) for rows in seen]
    assert len(batches) == 6
    colours = sorted(np.repeat(np.asarray(toy.batch().cond.pooled[:, 0]), toy.MEMBERS * (toy.STEPS - 1)))
    for each in (batches[:3], batches[3:]):
        assert np.array_equal(sorted(np.concatenate(each)), colours)
    assert batches[:3] != batches[3:]


def test_rows_that_fill_the_mesh_change_nothing():
    """Weight 0 behind the images: the same images make the same steps, with the same draws."""
    for likelihood, loss in ((True, "ppo"), (False, "nft")):
        given = experience(likelihood=likelihood)
        recipe = toy.recipe(updates=3, passes=2, loss=loss)
        zero = lambda a: jax.numpy.concatenate([a, 0 * a[:3]])
        filled = jax.tree.map(zero, given)
        plain, padded = (toy.learn(recipe, state(recipe), one)[0] for one in (given, filled))
        # sums over more rows, of which the last are zeros
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain.params, padded.params)
