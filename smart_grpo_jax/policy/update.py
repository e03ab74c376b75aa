"""Learn: the pure step from scored rollouts to a better policy.

`learn` is one jitted program: passes over the images of an epoch, optimizer steps per pass, gradient
calls per optimizer step, all as scans. What a loss needs of one gradient call is one function of
losses.py; everything else (batching, accumulation, clipping, guards against non-finite numbers, EMA) is
shared. See docs/algorithm.md, sections 3 and 4.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from smart_grpo_jax.core.types import Conditioning, Endpoints, PyTree, TrainState, Transitions
from smart_grpo_jax.maths import ema, rng
from smart_grpo_jax.policy import losses
from smart_grpo_jax.policy.losses import Draw, Experience, Knobs, Policy, Recipe
from smart_grpo_jax.policy.pieces import cut


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Clip by global norm, then Adam; the learning rate and the decay are applied where they are traced."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.grad_clip), optax.scale_by_adam(b1=0.9, b2=recipe.beta2, eps=1e-8)
    )


def init_state(recipe: Recipe, params: PyTree) -> TrainState:
    """The state before the first epoch; the average starts at the weights themselves."""
    zero = lambda: jnp.zeros((), jnp.int32)  # one buffer each: a donated buffer may appear once
    copy = jax.tree.map(jnp.copy, params)
    counters = {"skipped": zero(), "skipped_in_a_row": zero()}
    return TrainState(zero(), zero(), params, copy, optimizer(recipe).init(params), counters)


def actor(recipe: Recipe, state: TrainState) -> PyTree:
    """The weights that roll out and that the losses call old: the newest, or their slow average."""
    return state.ema if recipe.actor == "ema" else state.params


def learn(
    policy: Policy,
    recipe: Recipe,
    state: TrainState,
    frozen: PyTree,
    cond: Conditioning,
    experience: Experience,
    knobs: Knobs,
) -> tuple[TrainState, dict[str, Array]]:
    """One epoch of learning. Leaves of `experience` are [samples, states per sample, ...] (Transitions)
    or [samples, ...] (Endpoints); `cond` is the table that their `row` indexes."""
    old = actor(recipe, state)
    samples = experience.weight.shape[0]

    def one_pass(state: TrainState, i: Array) -> tuple[TrainState, dict[str, Array]]:
        order = _dealt(rng.at(rng.key(knobs.seed, "update", knobs.epoch), i), samples, recipe.updates)

        def one_update(state: TrainState, pick: Array) -> tuple[TrainState, dict[str, Array]]:
            batch = policy.constrain(_picked(experience, pick, recipe.updates))
            grads, metrics = _gradient(policy, recipe, state, old, frozen, cond, batch, knobs)
            return _apply(recipe, state, grads, metrics, knobs)

        return jax.lax.scan(one_update, state, order)

    state, metrics = jax.lax.scan(one_pass, state, jnp.arange(recipe.passes))
    flat = {k: v.reshape(-1) for k, v in metrics.items()}
    first = {"first_ratio_error": flat["ratio_error"][0]} if "ratio_error" in flat else {}
    worst = {k: v.max() for k, v in flat.items() if k == "ratio_error"}
    means = {k: v.mean() for k, v in flat.items()} | worst | first
    return state._replace(epoch=state.epoch + 1), means | {"skipped": state.counters["skipped"]}


def _dealt(key: Array, samples: int, updates: int) -> Int[Array, "updates blocks"]:
    """Which of each block of `updates` neighbouring samples an update gets: every update one of each.

    So an update sees all prompts, and a sample never leaves the device on which it was drawn.
    """
    deal = lambda block: jax.random.permutation(jax.random.fold_in(key, block), updates)
    return jax.vmap(deal)(jnp.arange(samples // updates)).T


def _picked(experience: Experience, pick: Int[Array, " blocks"], updates: int) -> Experience:
    """One sample of each block."""
    blocks = lambda a: a[: len(pick) * updates].reshape(len(pick), updates, *a.shape[1:])
    return jax.tree.map(lambda a: jax.vmap(lambda rows, i: rows[i])(blocks(a), pick), experience)


def _gradient(
    policy: Policy,
    recipe: Recipe,
    state: TrainState,
    old: PyTree,
    frozen: PyTree,
    cond: Conditioning,
    batch: Experience,
    knobs: Knobs,
) -> tuple[PyTree, dict[str, Array]]:
    """Gradient of the weighted mean loss, accumulated over calls of at most `chunk` states."""
    loss_fn = losses.LOSSES[recipe.loss]
    total = jnp.maximum((batch.weight > 0).sum(), 1)

    def call(params: PyTree, part: Experience, draw: Draw) -> tuple[Array, dict[str, Array]]:
        flat = _flatten(part)
        loss, metrics = loss_fn(policy, recipe, params, old, frozen, cond, flat, draw, knobs)
        share = (flat.weight > 0).sum() / total
        return loss * share, {k: v if k == "ratio_error" else v * share for k, v in metrics.items()}

    # Drawn for the whole batch, so that it does not depend on how the batch is cut into calls.
    draw = losses.draw(batch, rng.at(rng.key(knobs.seed, "update", knobs.epoch, 1), state.step))
    parts, draws = _split(batch, draw, recipe.chunk, policy.ways)
    grad_fn = jax.grad(call, has_aux=True)

    def accumulate(total_grads: PyTree, item: tuple[Experience, Draw]) -> tuple[PyTree, dict[str, Array]]:
        grads, metrics = grad_fn(state.params, *policy.constrain(item))
        return jax.tree.map(jnp.add, total_grads, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, metrics = jax.lax.scan(accumulate, zeros, (parts, draws))
    return grads, {k: v.max() if k == "ratio_error" else v.sum() for k, v in metrics.items()}


def _split(batch: Experience, draw: Draw, chunk: int, ways: int) -> tuple[Experience, Draw]:
    """[samples, ...] -> [calls, samples per call, ...], padded with weight 0."""
    samples, states = batch.weight.shape[0], 1
    if isinstance(batch, Transitions):
        states = batch.weight.shape[1]
    size = samples if chunk == 0 else max(1, chunk // states)
    (padded, draw), real = cut((batch, draw), size, ways)
    real = real.reshape(*real.shape, *(1,) * (batch.weight.ndim - 1))
    return padded._replace(weight=padded.weight * real), draw


def _flatten(batch: Experience) -> Experience:
    """[samples, states, ...] -> [samples x states, ...] for transitions; nothing in what weighs nothing.

    A latent that diverged to NaN has weight 0, but 0 x NaN in its gradient would spoil its whole batch.
    """
    if isinstance(batch, Endpoints):
        kept = batch.weight > 0
        return batch._replace(x0=_only(kept, batch.x0), advantage=_only(kept, batch.advantage))
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
    move = flat.weight > 0
    state = move.any(1)
    return flat._replace(
        x=_only(state, flat.x),
        mean=_only(state, flat.mean),
        x_next=_only(move, flat.x_next),
        log_prob=_only(move, flat.log_prob),
        advantage=_only(move, flat.advantage),
    )


def _only(kept: Array, a: Array) -> Array:
    return jnp.where(kept.reshape(*kept.shape, *(1,) * (a.ndim - kept.ndim)), a, 0)


def _apply(
    recipe: Recipe, state: TrainState, grads: PyTree, metrics: dict[str, Array], knobs: Knobs
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step and, when due, one step of the average; a non-finite gradient changes nothing."""
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
    # A branch, not a select per leaf: hundreds of small kernels fewer to compile.
    new = jax.lax.cond(finite, lambda: _moved(recipe, state, grads, knobs), lambda: state)
    row = jnp.where(finite, 0, state.counters["skipped_in_a_row"] + 1)
    skipped = state.counters["skipped"] + jnp.where(finite, 0, 1)
    new = new._replace(counters={"skipped": skipped, "skipped_in_a_row": row})
    metrics = {k: jnp.where(jnp.isfinite(v), v, 0.0) for k, v in metrics.items()}
    return new, metrics | {"grad_norm": jnp.where(finite, norm, 0.0)}


def _moved(recipe: Recipe, state: TrainState, grads: PyTree, knobs: Knobs) -> TrainState:
    """The state after an optimizer step along finite gradients."""
    updates, opt_state = optimizer(recipe).update(grads, state.opt_state, state.params)
    step = state.step.astype(jnp.float32)
    rate = knobs.learning_rate * jnp.minimum(1.0, (step + 1) / jnp.maximum(knobs.warmup, 1.0))
    params = jax.tree.map(
        lambda p, u: p - (rate * (u + knobs.weight_decay * p)).astype(p.dtype), state.params, updates
    )
    # kept = 1 leaves the average as it is to the bit, kept = 0 makes it the weights themselves
    due = ema.due(state.step, recipe.ema_every)
    kept = jnp.where(due, ema.decay(state.step, knobs.ema_decay), 1.0)
    averaged = ema.update(state.ema, params, jnp.where(knobs.ema_decay > 0, kept, 0.0))
    return TrainState(state.epoch, state.step + 1, params, averaged, opt_state, state.counters)


def non_finite(state: TrainState) -> Any:
    """Optimizer steps in a row whose gradient was not finite."""
    return state.counters["skipped_in_a_row"]
