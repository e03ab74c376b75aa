"""Learn: the pure step from scored rollouts to a better policy.

`learn` is one jitted program: passes over the images of an epoch, optimizer steps per pass, gradient
calls per optimizer step, all as scans. What a loss needs of one gradient call is one function in
`LOSSES`; everything else (batching, accumulation, clipping, guards against non-finite numbers, EMA) is
shared. See docs/algorithm.md, sections 3 and 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.types import Conditioning, Endpoints, PyTree, TrainState, Transitions, VelocityFn
from smart_grpo_jax.maths import awm, ema, grpo, nft, rng, transition
from smart_grpo_jax.policy.pieces import cut


@dataclasses.dataclass(frozen=True)
class Policy:
    """How trainable weights become a policy: `bind(frozen, trainable)` gives the velocity's params,
    `reference(frozen)` those of the model before training."""

    velocity: VelocityFn
    raw_velocity: VelocityFn
    bind: Callable[[PyTree, PyTree], PyTree]
    reference: Callable[[PyTree], PyTree]
    constrain: Callable[[PyTree], PyTree] = lambda tree: tree
    ways: int = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The static part of an update."""

    loss: str
    transition: str
    log_prob: str = "gaussian"
    kl: str = "flow_grpo"
    use_kl: bool = False
    updates: int = 2
    passes: int = 1
    chunk: int = 0
    adv_clip: float = 5.0
    actor: str = "raw"
    nft_beta: float = 1.0
    awm_weight: str = "ghuber"
    grad_clip: float = 1.0
    beta2: float = 0.999
    ema_every: int = 8


class Knobs(NamedTuple):
    """The traced part of an update."""

    seed: Int[Array, ""]
    epoch: Int[Array, ""]
    times: Float[Array, " steps+1"]
    noise_level: Float[Array, ""]
    step_weight: Float[Array, " steps"]
    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    warmup: Float[Array, ""]
    clip: Float[Array, ""]
    kl_weight: Float[Array, ""]
    ema_decay: Float[Array, ""]


class Draw(NamedTuple):
    """What the likelihood-free losses draw for each finished latent."""

    t: Float[Array, " m"] | None
    eps: Float[Array, "m h w c"] | None


GOLDEN = np.uint32(2654435769)
"""2³² over the golden ratio: its multiples, modulo 2³², leave no large gap however many they are."""

Experience = Transitions | Endpoints
LossFn = Callable[..., tuple[Array, dict[str, Array]]]


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
    loss_fn = LOSSES[recipe.loss]
    total = jnp.maximum((batch.weight > 0).sum(), 1)

    def call(params: PyTree, part: Experience, draw: Draw) -> tuple[Array, dict[str, Array]]:
        flat = _flatten(part)
        loss, metrics = loss_fn(policy, recipe, params, old, frozen, cond, flat, draw, knobs)
        share = (flat.weight > 0).sum() / total
        return loss * share, {k: v if k == "ratio_error" else v * share for k, v in metrics.items()}

    # Drawn for the whole batch, so that it does not depend on how the batch is cut into calls.
    draw = _draw(batch, rng.at(rng.key(knobs.seed, "update", knobs.epoch, 1), state.step))
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


def _likelihood_loss(
    policy: Policy,
    recipe: Recipe,
    params: PyTree,
    old: PyTree,
    frozen: PyTree,
    cond: Conditioning,
    batch: Transitions,
    draw: Draw,
    knobs: Knobs,
) -> tuple[Array, dict[str, Array]]:
    """PPO or GRPO-Guard on the density of stored steps: one forward per state, however many moves."""
    t, t_next = knobs.times[batch.step], knobs.times[batch.step + 1]
    rows = cond.rows(batch.row)
    v = policy.velocity(policy.bind(frozen, params), batch.x, t, rows)
    law = transition.step(recipe.transition, batch.x, v, t, t_next, knobs.noise_level, knobs.times[1])
    moves = batch.x_next.shape[1]
    std = jnp.broadcast_to(law.std, (len(t), 1, 1, 1))
    flat = batch.x_next.reshape(-1, *batch.x_next.shape[2:])
    each = lambda a: jnp.repeat(a, moves, axis=0)
    log_prob = transition.LOG_PROBS[recipe.log_prob](flat, each(law.mean), each(std)).reshape(-1, moves)
    weight = batch.weight * knobs.step_weight[batch.step][:, None]
    pair = (log_prob, batch.log_prob)
    if recipe.loss == "guard":
        loss, metrics = grpo.guard_loss(
            *pair, law.mean, batch.mean, std, batch.advantage, knobs.clip, weight=weight
        )
    else:
        loss, metrics = grpo.ppo_loss(*pair, batch.advantage, knobs.clip, weight=weight)
    ratio = jnp.where(batch.weight > 0, jnp.abs(jnp.exp(log_prob - batch.log_prob) - 1), 0.0)
    metrics = {"loss": loss, "ratio_error": ratio.max(), **_without_max(metrics)}
    if not recipe.use_kl:
        return loss, metrics
    v_ref = jax.lax.stop_gradient(policy.velocity(policy.reference(frozen), batch.x, t, rows))
    law_ref = transition.step(recipe.transition, batch.x, v_ref, t, t_next, knobs.noise_level, knobs.times[1])
    kl = transition.kl(recipe.kl, law.mean, law_ref.mean, std, t_next - t, v, v_ref)
    kl = grpo.masked_mean(kl, (batch.weight > 0).any(1).astype(kl.dtype))
    return loss + knobs.kl_weight * kl, metrics | {"kl": kl}


def _without_max(metrics: dict[str, Array]) -> dict[str, Array]:
    return {k: v for k, v in metrics.items() if "max" not in k}


def _draw(batch: Experience, key: Array) -> Draw:
    """Fresh times and noise per finished latent; stored steps carry their own. What a row draws follows from
    its place, not from the number of rows, for a mesh may have been filled up behind them: times are spread
    over (0.05, 1) by multiples of the golden ratio from a random start."""
    if isinstance(batch, Transitions):
        return Draw(None, None)
    rows = batch.x0.shape[0]
    key_t, key_eps = jax.random.split(key)
    turns = jax.random.bits(key_t, dtype=jnp.uint32) + jnp.arange(rows, dtype=jnp.uint32) * GOLDEN
    u = (turns >> 8).astype(jnp.float32) * 2.0**-24
    eps = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key_eps, row), batch.x0.shape[1:]))
    return Draw(0.05 + 0.95 * u, eps(jnp.arange(rows)))


def _endpoint_loss(
    policy: Policy,
    recipe: Recipe,
    params: PyTree,
    old: PyTree,
    frozen: PyTree,
    cond: Conditioning,
    batch: Endpoints,
    draw: Draw,
    knobs: Knobs,
) -> tuple[Array, dict[str, Array]]:
    """NFT or AWM: the bare network (no guidance) on re-noised finished latents, no density."""
    t, eps = draw
    assert t is not None and eps is not None
    wide = t[:, None, None, None]
    x_t = (1 - wide) * batch.x0 + wide * eps
    rows = cond.rows(batch.row)

    def velocity(bound: PyTree) -> Array:
        return policy.raw_velocity(bound, x_t, t, rows)

    v = velocity(policy.bind(frozen, params))
    v_old = jax.lax.stop_gradient(velocity(policy.bind(frozen, old)))
    v_ref = jax.lax.stop_gradient(velocity(policy.reference(frozen))) if recipe.use_kl else v_old
    kl_weight = knobs.kl_weight if recipe.use_kl else 0.0
    given = (v, v_old, v_ref, batch.x0, eps, t, batch.advantage)
    shared = {"kl_weight": kl_weight, "weight": batch.weight}
    if recipe.loss == "nft":
        loss, metrics = nft.loss(*given, beta=recipe.nft_beta, adv_clip=recipe.adv_clip, **shared)
    else:
        loss, metrics = awm.loss(*given, clip=knobs.clip, weighting=recipe.awm_weight, **shared)
    if not recipe.use_kl:
        metrics = {k: v for k, v in metrics.items() if k != "kl"}
    return loss, {"loss": loss, **_without_max(metrics)}


LOSSES: dict[str, LossFn] = {
    "ppo": _likelihood_loss,
    "guard": _likelihood_loss,
    "nft": _endpoint_loss,
    "awm": _endpoint_loss,
}


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
