"""A policy of twenty numbers: everything that rollout and update ask of a model, without a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.types import Conditioning, Scores
from smart_grpo_jax.maths import schedule, search
from smart_grpo_jax.policy import credit, rollout, update

LATENT = (2, 2, 4)
GROUPS, MEMBERS, STEPS = 3, 4, 5
TIMES = jnp.asarray(schedule.sd3(STEPS))


def weights(seed=0):
    key_w, key_b = jax.random.split(jax.random.key(seed))
    return {"w": 0.3 * jax.random.normal(key_w, (4, 4)), "b": 0.3 * jax.random.normal(key_b, (3, 4))}


def velocity(params, x, t, cond):
    """v = x W + t tanh(pooled B)."""
    bias = t[:, None] * jnp.tanh(cond.pooled @ params["b"])
    return x @ params["w"] + bias[:, None, None, :]


def decode(params, x0):
    return jax.nn.sigmoid(x0[..., :3])


def score(params, images, ctx, t=None):
    """Minus the squared distance to the colour that is wanted; NaN colours fail."""
    value = -jnp.mean((images - ctx[:, None, None, :]) ** 2, (1, 2, 3))
    return Scores(value, jnp.isfinite(value), {"toy": value})


def functions(**changes):
    base = rollout.Functions(velocity, velocity, decode, score, score)
    return dataclasses.replace(base, **changes)


def policy(**changes):
    return dataclasses.replace(update.Policy(velocity, velocity, bind, reference), **changes)


def bind(frozen, trained):
    return trained


def reference(frozen):
    return frozen


def params(trained=None):
    policy = weights() if trained is None else trained
    return {"policy": policy, "decoder": {}, "reward": {}, "search_reward": {}}


def shape(**changes):
    given = {"latent": LATENT, "members": MEMBERS, "steps": STEPS, "stop": STEPS, "searched_members": MEMBERS}
    return rollout.Shape(**(given | changes))


def settings(**changes):
    return search.settings(**({"rounds": 2, "candidates": 4, "elite": 0.5} | changes))


def knobs(searched=(), noise_level=0.7, stochastic=None, execute=True, seed=0, epoch=0, **changes):
    noisy = np.arange(STEPS) < STEPS - 1 if stochastic is None else np.asarray(stochastic)
    return rollout.Knobs(
        jnp.uint32(seed),
        jnp.int32(epoch),
        TIMES,
        jnp.float32(noise_level),
        jnp.asarray(noisy),
        jnp.asarray(np.isin(np.arange(STEPS), searched)),
        jnp.asarray(execute),
        settings(**changes),
    )


def batch(groups=GROUPS, start=0):
    """Prompts start … start + groups - 1, each with a colour of its own."""
    ids = jnp.arange(start, start + groups, dtype=jnp.int32)
    colour = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(jax.random.key(9), i), (3,)))(ids)
    cond = Conditioning(jnp.zeros((groups, 1, 1)), colour)
    return rollout.Batch(ids, cond, colour, colour, jnp.zeros_like(ids))


def masks(searched=(), trained=None, offset=1.0, real=None, groups=GROUPS):
    return credit.Masks(
        jnp.asarray(np.arange(STEPS - 1) if trained is None else trained, jnp.int32),
        jnp.asarray(np.isin(np.arange(STEPS), searched)),
        jnp.float32(offset),
        jnp.ones(groups, bool) if real is None else jnp.asarray(real),
    )


def act(shape_, knobs_, batch_=None, fns=None, trained=None):
    program = acting(fns or functions(), shape_)
    return program(params(trained), knobs_, batch() if batch_ is None else batch_)


@functools.cache
def acting(fns, shape_):
    """Equal arguments, one program: compiling is most of what these tests cost."""
    return jax.jit(functools.partial(rollout.act, fns, shape_))


def experience(rule, shape_, acted, masks_):
    return crediting(rule, shape_)(acted, masks_)


@functools.cache
def crediting(rule, shape_):
    return jax.jit(functools.partial(credit.experience, rule, shape_))


def recipe(**changes):
    return update.Recipe(**({"loss": "ppo", "transition": "flow", "updates": 2} | changes))


def update_knobs(**changes):
    given = {
        "seed": jnp.uint32(0), "epoch": jnp.int32(0), "times": TIMES, "noise_level": jnp.float32(0.7),
        "step_weight": jnp.ones(STEPS), "learning_rate": jnp.float32(1e-3), "weight_decay": jnp.float32(0.0),
        "warmup": jnp.float32(0.0), "clip": jnp.float32(0.2), "kl_weight": jnp.float32(0.0),
        "ema_decay": jnp.float32(0.9),
    }  # fmt: skip
    return update.Knobs(**(given | {k: jnp.asarray(v, given[k].dtype) for k, v in changes.items()}))


def learn(recipe_, state, experience, knobs_=None, cond=None, policy_=None, frozen=None):
    knobs_ = update_knobs() if knobs_ is None else knobs_
    frozen = weights() if frozen is None else frozen
    cond = batch().cond if cond is None else cond
    return learning(policy_ or policy(), recipe_)(state, frozen, cond, experience, knobs_)


@functools.cache
def learning(policy_, recipe_):
    return jax.jit(functools.partial(update.learn, policy_, recipe_))


def same(a, b):
    """Equal to the bit, leaf by leaf."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
