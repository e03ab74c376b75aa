import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy as toy

from smart_grpo_jax.core.types import Scores
from smart_grpo_jax.jobs import record
from smart_grpo_jax.maths import rng, transition
from smart_grpo_jax.policy import rollout
from smart_grpo_jax.runtime.compile_cache import CompileCount

NONE = np.zeros(toy.STEPS, bool)
PLAIN = toy.shape(searched_members=0)


def first_latents(groups=toy.GROUPS, members=toy.MEMBERS):
    """x_1 of every image, one by one, from the names of its key alone."""
    return np.stack(
        [
            jax.random.normal(rng.key(0, "latent", 0, prompt, member), toy.LATENT)
            for prompt in range(groups)
            for member in range(members)
        ]
    )


def test_rows_are_members_of_groups_and_start_from_their_own_noise():
    acted = toy.act(toy.shape(), toy.knobs())
    assert acted.x.shape == (toy.STEPS, toy.GROUPS * toy.MEMBERS, *toy.LATENT)
    assert np.array_equal(acted.x[0], first_latents())
    assert np.array_equal(acted.x[1:], acted.x_next[:-1]) and np.array_equal(acted.x_next[-1], acted.x0)


def test_the_same_latent_serves_a_whole_group_when_asked():
    acted = toy.act(dataclasses.replace(PLAIN, same_latent=True), toy.knobs())
    first = np.asarray(acted.x[0]).reshape(toy.GROUPS, toy.MEMBERS, -1)
    assert np.array_equal(first, np.broadcast_to(first[:, :1], first.shape))
    assert len(np.unique(np.asarray(acted.x0)[:, 0, 0, 0])) == toy.GROUPS * toy.MEMBERS


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_without_a_noisy_step_a_rollout_is_the_ode_to_the_bit(kind):
    knobs = toy.knobs(stochastic=NONE)
    acted = toy.act(dataclasses.replace(PLAIN, transition=kind), knobs)
    row = jnp.repeat(jnp.arange(toy.GROUPS), toy.MEMBERS)

    @jax.jit
    def euler(params, x, cond):
        def step(x, pair):
            t, t_next = pair
            return x + toy.velocity(params, x, jnp.full(len(x), t), cond) * (t_next - t), None

        return jax.lax.scan(step, x, (toy.TIMES[:-1], toy.TIMES[1:]))[0]

    x0 = euler(toy.weights(), first_latents(), toy.batch().cond.rows(row))
    assert np.array_equal(acted.x0, x0)
    assert np.array_equal(acted.log_prob, np.zeros_like(acted.log_prob))


def test_a_level_of_zero_is_the_ode_to_the_bit():
    noisy = toy.act(PLAIN, toy.knobs(noise_level=0.0))
    assert toy.same(noisy.x0, toy.act(PLAIN, toy.knobs(stochastic=NONE)).x0)


def test_nothing_but_the_name_of_an_image_decides_its_noise():
    whole = toy.act(PLAIN, toy.knobs())
    alone = toy.act(dataclasses.replace(PLAIN, members=2), toy.knobs(), toy.batch(1, start=1))
    few = np.asarray(whole.x).reshape(toy.STEPS, toy.GROUPS, toy.MEMBERS, -1)[:, 1, :2]
    assert np.array_equal(few[0], np.asarray(alone.x[0]).reshape(2, -1))
    # the matrix products of another batch size may round otherwise
    np.testing.assert_allclose(few, np.asarray(alone.x).reshape(toy.STEPS, 2, -1), atol=1e-5)
    other = toy.act(PLAIN, toy.knobs(epoch=1))
    assert not np.isclose(other.x[0], whole.x[0]).any()


def test_rollouts_in_parts_give_the_same_rewards():
    whole = toy.act(toy.shape(), toy.knobs(searched=[1]), toy.batch(4))
    parts = [toy.act(toy.shape(), toy.knobs(searched=[1]), toy.batch(2, start)) for start in (0, 2)]
    joined = record.join(parts)
    assert jax.tree.map(np.shape, joined) == jax.tree.map(np.shape, whole)
    # one batch size or another: a last bit per step, doubled by a few steps
    np.testing.assert_allclose(joined.reward, whole.reward, atol=1e-6)
    np.testing.assert_allclose(joined.found.rewards, whole.found.rewards, atol=1e-6)


@pytest.mark.parametrize("field", ["decode_chunk", "reward_chunk"])
def test_decoding_and_scoring_in_chunks_changes_nothing(field):
    whole = toy.act(PLAIN, toy.knobs())
    parts = toy.act(dataclasses.replace(PLAIN, **{field: 5}), toy.knobs())
    np.testing.assert_allclose(parts.reward, whole.reward, atol=1e-6)  # elementwise; sums may be reordered
    np.testing.assert_allclose(parts.images, whole.images, atol=1e-6)


def test_searching_a_few_states_at_a_time_changes_nothing():
    whole = toy.act(toy.shape(), toy.knobs(searched=[1, 2]))
    parts = toy.act(toy.shape(chunk=5), toy.knobs(searched=[1, 2]))
    np.testing.assert_allclose(parts.x0, whole.x0, atol=1e-5)  # another batch size in the network
    np.testing.assert_allclose(parts.found.rewards, whole.found.rewards, atol=1e-6)


def test_one_program_serves_every_variant_of_the_search():
    fns, shape = toy.functions(), toy.shape()
    program = jax.jit(lambda p, k, b: rollout.act(fns, shape, p, k, b))
    params, batch = toy.params(), toy.batch()
    variants = [
        toy.knobs(searched=[1]),
        toy.knobs(searched=[0, 2, 3]),
        toy.knobs(stochastic=NONE),
        toy.knobs(searched=[1], noise_level=0.3),
        toy.knobs(searched=[1], returns="best"),
        toy.knobs(searched=[1], returns="sample"),
        toy.knobs(searched=[1], select="random"),
        toy.knobs(searched=[1], sigma_floor=0.2, smoothing=0.5, noise_norm="rms"),
        toy.knobs(searched=[1], execute=False),
        toy.knobs(searched=[1], seed=5, epoch=7),
    ]
    first = jax.block_until_ready(program(params, toy.knobs(), batch))
    with CompileCount() as count:
        results = [np.asarray(program(params, variant, batch).x0) for variant in variants]
    assert count.total == 0 and program._cache_size() == 1
    results.append(np.asarray(first.x0))
    shown = {r.tobytes() for r in results}
    assert len(shown) == len(variants)  # all differ, but not executing the search is not searching


def test_a_search_that_is_not_executed_leaves_the_path_alone_but_tells_what_it_found():
    plain = toy.act(toy.shape(), toy.knobs())
    tried = toy.act(toy.shape(), toy.knobs(searched=[1], execute=False))
    assert toy.same(tried.x, plain.x) and toy.same(tried.reward, plain.reward)
    assert np.any(np.asarray(tried.found.rewards[1]) != 0) and np.all(np.asarray(plain.found.rewards) == 0)


def test_only_the_searched_members_and_steps_move_otherwise():
    shape = toy.shape(searched_members=1)
    plain, searched = toy.act(shape, toy.knobs()), toy.act(shape, toy.knobs(searched=[2]))
    grid = lambda a: np.asarray(a).reshape(toy.STEPS, toy.GROUPS, toy.MEMBERS, -1)
    a, b = grid(plain.x_next), grid(searched.x_next)
    assert np.array_equal(a[:2], b[:2]) and np.array_equal(a[:, :, 1:], b[:, :, 1:])
    assert (a[2:, :, 0] != b[2:, :, 0]).any(-1).all()
    assert searched.found.rewards.shape == (toy.STEPS, toy.GROUPS, 2, 4)


def test_the_search_earns_reward_and_its_last_round_more_than_its_first():
    knobs = {"candidates": 16, "rounds": 4}
    plain = toy.act(toy.shape(), toy.knobs(**knobs))
    searched = toy.act(toy.shape(), toy.knobs(searched=[1, 2, 3], **knobs))
    assert searched.reward.mean() > plain.reward.mean()
    rounds = np.asarray(searched.found.rewards)[1:4].mean((0, 1, 3))
    assert rounds[-1] > rounds[0]


def standardised(returns):
    """The executed noise of one searched step of 512 states under random selection and floor 1."""
    shape = toy.shape(members=16, searched_members=16)
    knobs = toy.knobs(
        searched=[1], select="random", sigma_floor=1.0, returns=returns, rounds=3, candidates=4, elite=0.5
    )
    acted = toy.act(shape, knobs, toy.batch(32))
    law = transition.step(
        "flow", acted.x[1], jnp.zeros_like(acted.x[1]), toy.TIMES[1], toy.TIMES[2], 0.7, toy.TIMES[1]
    )
    return np.asarray((acted.x_next[1] - acted.mean[1]) / law.std).reshape(512, -1).astype(np.float64)


@pytest.mark.parametrize("returns", ["mean", "sample", "best"])
def test_random_selection_with_floor_one_executes_plain_noise(returns):
    noise = standardised(returns)
    count = noise.size  # 8,192 numbers; every bound below is five standard errors of i.i.d. noise
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**3).mean()) < 5 * (15 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5
    neighbours = np.concatenate([(noise[:, 1:] * noise[:, :-1]).ravel(), (noise[1:] * noise[:-1]).ravel()])
    assert abs(neighbours.mean()) < 5 / neighbours.size**0.5


def test_a_rollout_may_stop_early_with_the_one_step_estimate():
    whole, early = toy.act(PLAIN, toy.knobs()), toy.act(dataclasses.replace(PLAIN, stop=2), toy.knobs())
    assert early.x.shape[0] == 2
    np.testing.assert_allclose(early.x, whole.x[:2], atol=1e-6)  # another program, the same numbers
    row = jnp.repeat(jnp.arange(toy.GROUPS), toy.MEMBERS)
    x, t = early.x_next[-1], toy.TIMES[2]
    v = toy.velocity(toy.weights(), x, jnp.full(len(x), t), toy.batch().cond.rows(row))
    np.testing.assert_allclose(early.x0, x - t * v, atol=1e-6)


def test_one_step_rewards_lead_from_the_first_guess_to_the_finished_image():
    acted = toy.act(dataclasses.replace(PLAIN, one_step_rewards=True), toy.knobs())
    plain = toy.act(PLAIN, toy.knobs())
    assert acted.one_step.shape == (toy.STEPS + 1, toy.GROUPS * toy.MEMBERS)
    np.testing.assert_allclose(acted.one_step[-1], plain.reward, atol=1e-6)  # another program
    x, row = acted.x[1], jnp.repeat(jnp.arange(toy.GROUPS), toy.MEMBERS)
    v = toy.velocity(toy.weights(), x, jnp.full(len(x), toy.TIMES[1]), toy.batch().cond.rows(row))
    images = toy.decode({}, x - toy.TIMES[1] * v)
    np.testing.assert_allclose(
        acted.one_step[1], toy.score({}, images, toy.batch().ctx[row]).value, atol=1e-6
    )


def test_a_failed_reward_is_missing_and_last_in_the_search():
    middle = float(np.median(toy.act(toy.shape(), toy.knobs()).images[:, 0, 0, 0]))

    def sometimes(params, images, ctx, t=None):
        scores = toy.score(params, images, ctx, t)
        return Scores(scores.value, images[:, 0, 0, 0] > middle, scores.parts)

    fns = toy.functions(score=sometimes, search_score=sometimes)
    plain = toy.act(toy.shape(), toy.knobs(), fns=fns)
    assert np.sum(~np.asarray(plain.ok)) > 0
    assert np.array_equal(np.isnan(plain.reward), ~np.asarray(plain.ok))
    acted = toy.act(toy.shape(), toy.knobs(searched=[1], returns="best"), fns=fns)
    assert np.sum(acted.ok) > np.sum(plain.ok)  # what fails is not chosen
    rewards = np.asarray(acted.found.rewards[1])
    assert np.isnan(rewards).any() and np.isfinite(np.asarray(acted.x0)).all()
    nothing = dataclasses.replace(
        fns, search_score=lambda *a: Scores(a[1].sum((1, 2, 3)), a[1][:, 0, 0, 0] > 2, {})
    )
    failed = toy.act(toy.shape(), toy.knobs(searched=[1]), fns=nothing)
    assert np.isfinite(np.asarray(failed.x0)).all()


def test_every_call_of_the_network_and_the_decoder_is_counted():
    from smart_grpo_jax.core.config import Config
    from smart_grpo_jax.policy import cost

    seen = {"velocity": 0, "decode": 0}

    def counted(name, fn):
        def call(params, x, *rest):
            jax.debug.callback(lambda row: seen.update({name: seen[name] + 1}), x[:1, 0, 0, 0])
            return fn(params, x, *rest)

        return call

    def rows(name, fn):
        """One tick per row, whatever vmap makes of the batch."""
        one = counted(name, fn)
        return lambda params, x, *rest: jax.vmap(
            lambda *row: one(params, *jax.tree.map(lambda a: a[None], row))
        )(x, *rest)

    def unbatched(fn):
        return lambda *args: jax.tree.map(lambda a: a[:, 0], fn(*args))

    velocity = unbatched(rows("velocity", toy.velocity))
    decode = unbatched(rows("decode", toy.decode))
    fns = toy.functions(velocity=velocity, search_velocity=velocity, decode=decode)
    config = Config()
    config = dataclasses.replace(
        config, sampler=dataclasses.replace(config.sampler, guidance=1.0),
        search=dataclasses.replace(config.search, rounds=2, candidates=4),
    )  # fmt: skip
    early = {"stop": 3, "one_step_rewards": True}
    for changes in ({}, early | {"searched_members": 2}, {"lookahead": 3}, early | {"lookahead": 3}):
        shape = toy.shape(**changes)
        seen.update(velocity=0, decode=0)
        jax.block_until_ready(toy.act(shape, toy.knobs(searched=[1, 2]), fns=fns))
        jax.effects_barrier()
        counts = cost.sampling(shape, config, toy.GROUPS, 2)
        assert seen == {name: counts[name] for name in seen}, changes
