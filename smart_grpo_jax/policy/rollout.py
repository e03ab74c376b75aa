"""Act: draw latents under a stochastic policy whose noise is searched at chosen steps.

One jitted program serves Flow-GRPO, every variant of the search with the same shapes, and ODE sampling:
which steps are noisy or searched, the noise level and what the search returns are traced values.
The velocity network, the decoder and the reward are arguments, so this file knows no model.
See docs/algorithm.md, sections 1, 2 and 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from smart_grpo_jax.core.types import Conditioning, DecodeFn, PyTree, ScoreFn, Scores, VelocityFn
from smart_grpo_jax.maths import rng, search, transition
from smart_grpo_jax.policy.pieces import in_pieces


@dataclasses.dataclass(frozen=True)
class Functions:
    """What the programs call: `velocity` is guided, `search_velocity` judges candidates, `prefer` orders
    those of one state, `constrain` lays a batch-major tree over the mesh, over `ways` devices."""

    velocity: VelocityFn
    search_velocity: VelocityFn
    decode: DecodeFn
    score: ScoreFn
    search_score: ScoreFn
    prefer: Callable[[Scores], Float[Array, " k"]] = lambda scores: scores.value
    constrain: Callable[[PyTree], PyTree] = lambda tree: tree
    ways: int = 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static part of a rollout: a change of it is a new program."""

    latent: tuple[int, int, int]
    members: int
    steps: int
    stop: int
    transition: str = "flow"
    log_prob: str = "gaussian"
    space: str = "transition"
    searched_members: int = 0
    lookahead: int = 1
    chunk: int = 0
    one_step_rewards: bool = False
    decode_chunk: int = 0
    reward_chunk: int = 0
    same_latent: bool = False


class Knobs(NamedTuple):
    """The traced part: one compiled program serves all values of these."""

    seed: Int[Array, ""]
    epoch: Int[Array, ""]
    times: Float[Array, " steps+1"]
    noise_level: Float[Array, ""]
    stochastic: Bool[Array, " steps"]
    searched: Bool[Array, " steps"]
    execute_search: Bool[Array, ""]
    search: search.Settings


class Batch(NamedTuple):
    """The prompts of one rollout: p groups, one row each. `prompt_id` and `member`, the index of the group's
    first member, say which noise the images get."""

    prompt_id: Int[Array, " p"]
    cond: Conditioning
    ctx: PyTree
    search_ctx: PyTree
    member: Int[Array, " p"]


class Found(NamedTuple):
    """What the search saw at each step: its rewards, the length of its noise, and its candidates."""

    rewards: Float[Array, "t s n k"]
    rms: Float[Array, "t s"]
    x_next: Float[Array, "t s nk h w c"] | None
    log_prob: Float[Array, "t s nk"] | None


class Acted(NamedTuple):
    """A rollout of b = groups x members latents over t steps."""

    x: Float[Array, "t b h w c"]
    x_next: Float[Array, "t b h w c"]
    mean: Float[Array, "t b h w c"]
    log_prob: Float[Array, "t b"]
    x0: Float[Array, "b h w c"]
    images: Float[Array, "b H W 3"]
    reward: Float[Array, " b"]
    ok: Bool[Array, " b"]
    parts: dict[str, Float[Array, " b"]]
    one_step: Float[Array, "t+1 b"] | None
    found: Found | None


def act(fns: Functions, shape: Shape, params: PyTree, knobs: Knobs, batch: Batch) -> Acted:
    """Roll out every member of every group.

    `params` holds "policy", "decoder", "reward" and, where the search has one of its own, "search_reward":
    arrays that are passed twice would count twice in the memory of the program. Row b of the result is member
    b % members of group b // members. With `shape.stop < shape.steps` the rollout ends early and x0 is
    the forecast from where it stopped.
    """
    groups = batch.prompt_id.shape[0]
    row = jnp.repeat(jnp.arange(groups), shape.members)
    keys, x = _start(shape, knobs, batch, row)
    x = fns.constrain(x)
    cond, ctx = fns.constrain((batch.cond.rows(row), jax.tree.map(lambda a: a[row], batch.ctx)))

    def advance(x: Array, j: Array) -> tuple[Array, dict[str, PyTree]]:
        t, t_next = knobs.times[j], knobs.times[j + 1]
        v = fns.velocity(params["policy"], x, jnp.full(x.shape[0], t), cond)
        level = jnp.where(knobs.stochastic[j], knobs.noise_level, 0.0)
        law = transition.step(shape.transition, x, v, t, t_next, level, knobs.times[1])
        noise = jax.vmap(lambda key: jax.random.normal(rng.at(key, j), shape.latent))(keys)
        out: dict[str, PyTree] = {}
        if shape.one_step_rewards:
            x0 = _forecast(fns.velocity, shape, params, x, v, t, cond)
            out["one_step"] = _judge(fns, shape, params, x0, ctx, t)[0]
        if shape.searched_members:
            noise, out["found"] = _search_step(fns, shape, params, knobs, batch, keys, j, x, law, noise)
        x_next = fns.constrain(transition.sample(law, noise))
        log_prob = _log_prob(shape.log_prob, x_next, law)
        return x_next, out | {"x": x, "x_next": x_next, "mean": law.mean, "log_prob": log_prob}

    x, path = jax.lax.scan(advance, x, jnp.arange(shape.stop))
    return _finish(fns, shape, params, knobs, x, path, cond, ctx)


def _start(shape: Shape, knobs: Knobs, batch: Batch, row: Array) -> tuple[Array, Array]:
    """Keys of every image and its first latent: functions of seed, epoch, prompt and member only."""
    groups = batch.prompt_id.shape[0]
    member = batch.member[row] + jnp.tile(jnp.arange(shape.members), groups)

    def keys(purpose: str, member: Array) -> Array:
        make = lambda prompt, member: rng.key(knobs.seed, purpose, knobs.epoch, prompt, member)
        return jax.vmap(make)(batch.prompt_id[row], member)

    first = keys("latent", jnp.zeros_like(member) if shape.same_latent else member)
    x = jax.vmap(lambda key: jax.random.normal(key, shape.latent))(first)
    return keys("noise", member), x


def _log_prob(kind: str, x_next: Array, law: transition.Transition) -> Array:
    return transition.LOG_PROBS[kind](x_next, law.mean, law.std)


def _forecast(
    velocity: VelocityFn, shape: Shape, params: PyTree, x: Array, v: Array, t: Array, cond: Conditioning
) -> Array:
    """The finished latent that `shape.lookahead` network calls see from x at t; the first of them gave v."""
    ask = lambda x, t: velocity(params["policy"], x, jnp.full(x.shape[0], t), cond)
    return transition.forecast(ask, x, v, t, shape.lookahead)


def _judge(
    fns: Functions, shape: Shape, params: PyTree, x0: Array, ctx: PyTree, t: Array | None
) -> tuple[Array, Array, dict[str, Array], Array]:
    """Decode and score: (value with NaN where it failed, ok, parts, images)."""
    pieces = partial(in_pieces, ways=fns.ways, constrain=fns.constrain)
    images = pieces(lambda z: fns.decode(params["decoder"], z), shape.decode_chunk, x0)
    scores = pieces(lambda a: fns.score(params["reward"], a[0], a[1], t), shape.reward_chunk, (images, ctx))
    value = jnp.where(scores.ok, scores.value, jnp.nan)
    return value, scores.ok, scores.parts, images


def _search_step(
    fns: Functions,
    shape: Shape,
    params: PyTree,
    knobs: Knobs,
    batch: Batch,
    keys: Array,
    j: Array,
    x: Array,
    law: transition.Transition,
    noise: Array,
) -> tuple[Array, Found]:
    """Replace the noise of the searched members, if step j is searched; else cost nothing."""
    groups, members, few = batch.prompt_id.shape[0], shape.members, shape.searched_members
    std = jnp.broadcast_to(law.std, (x.shape[0], 1, 1, 1))
    pick = lambda a: a.reshape(groups, members, *a.shape[1:])[:, :few].reshape(groups * few, *a.shape[1:])
    row = jnp.repeat(jnp.arange(groups), few)
    states = (pick(keys), pick(x), pick(law.mean), pick(std), row)

    def search_all(fns: Functions, states: tuple[Array, ...]) -> tuple[Array, Found]:
        return _search_states(fns, shape, params, knobs, batch, j, states)

    def run() -> tuple[Array, Found]:
        return in_pieces(partial(search_all, fns), shape.chunk, states, fns.ways, fns.constrain)

    empty = jax.eval_shape(partial(search_all, _no_work(fns)), states)
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), empty)
    best, found = jax.lax.cond(knobs.searched[j], run, lambda: blank)
    use = knobs.searched[j] & knobs.execute_search
    grid = noise.reshape(groups, members, *noise.shape[1:])
    best = jnp.where(use, best.reshape(groups, few, *noise.shape[1:]), grid[:, :few])
    return grid.at[:, :few].set(best).reshape(noise.shape), found


def _no_work(fns: Functions) -> Functions:
    """Stand-ins of the same shapes: what a search returns is known without tracing the networks again."""
    score = lambda params, images, ctx, t: Scores(jnp.zeros(len(images)), jnp.ones(len(images), bool), {})
    return dataclasses.replace(
        fns,
        search_velocity=lambda params, x, t, cond: x,
        decode=lambda params, z: z,
        search_score=score,
        prefer=lambda scores: scores.value,
    )


def _search_states(
    fns: Functions,
    shape: Shape,
    params: PyTree,
    knobs: Knobs,
    batch: Batch,
    j: Array,
    states: tuple[Array, ...],
) -> tuple[Array, Found]:
    """Algorithm 1 at n states: candidates are perturbed, decoded in one step or few, scored, refit.

    The networks see the k candidates of all states as one batch [n k].
    """
    keys, x, mean, std, row = states
    t, t_next = knobs.times[j], knobs.times[j + 1]
    origin, level = (mean, t_next) if shape.space == "transition" else (x, t)
    flat = lambda a: fns.constrain(a.reshape(-1, *a.shape[2:]))
    count = knobs.search.candidates
    each = jnp.repeat(row, count)
    cond, ctx = fns.constrain((batch.cond.rows(each), jax.tree.map(lambda a: a[each], batch.search_ctx)))

    def score(m: Array) -> tuple[Array, Array]:
        z = flat(origin[:, None] + std[:, None] * m)
        v = fns.search_velocity(params["policy"], z, jnp.full(z.shape[0], level), cond)
        latents = _forecast(fns.search_velocity, shape, params, z, v, level, cond)
        asked = params.get("search_reward", params["reward"])
        # Decode and judge a piece: the pictures of all candidates never lie there at once.
        judge = lambda a: fns.search_score(asked, fns.decode(params["decoder"], a[0]), a[1], level)
        piece = min(filter(None, (shape.decode_chunk, shape.reward_chunk)), default=0)
        scores = in_pieces(judge, piece, (latents, ctx), fns.ways, fns.constrain)
        scores = jax.tree.map(lambda a: a.reshape(-1, count), scores)
        ok = lambda value: jnp.where(scores.ok, value, jnp.nan)
        return ok(scores.value), ok(jax.vmap(fns.prefer)(scores))

    at = jax.vmap(lambda key: rng.at(key, j, 1))(keys)
    result = search.search_many(at, score, shape.latent, knobs.search)
    rms = jnp.sqrt(jnp.mean(result.noise**2, (1, 2, 3)))
    if result.candidates is None:
        return result.noise, Found(result.rewards, rms, None, None)
    moves = result.candidates.reshape(len(x), -1, *shape.latent)
    x_next = mean[:, None] + std[:, None] * moves
    law = transition.Transition(mean[:, None], std[:, None])
    log_prob = jax.vmap(partial(_log_prob, shape.log_prob))(x_next, law)
    return result.noise, Found(result.rewards, rms, x_next, log_prob)


def _finish(
    fns: Functions,
    shape: Shape,
    params: PyTree,
    knobs: Knobs,
    x: Array,
    path: dict[str, PyTree],
    cond: Conditioning,
    ctx: PyTree,
) -> Acted:
    """Decode and score the last latents (one-step estimates, where the rollout stopped early)."""
    t = None
    if shape.stop < shape.steps or shape.one_step_rewards:
        t = knobs.times[shape.stop]
        v = fns.velocity(params["policy"], x, jnp.full(x.shape[0], t), cond)
        x = jnp.where(t > 0, _forecast(fns.velocity, shape, params, x, v, t, cond), x)
    value, ok, parts, images = _judge(fns, shape, params, x, ctx, t if shape.stop < shape.steps else None)
    one_step = jnp.concatenate([path["one_step"], value[None]]) if shape.one_step_rewards else None
    return Acted(
        path["x"],
        path["x_next"],
        path["mean"],
        path["log_prob"],
        x,
        images,
        value,
        ok,
        parts,
        one_step,
        path.get("found"),
    )
