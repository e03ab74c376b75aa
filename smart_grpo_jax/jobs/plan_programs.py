"""The programs of a run without its weights: the functions that training jits, and their arguments as shapes
that lie on a mesh, perhaps of devices that are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import Conditioning, PyTree, TrainState
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.hub import abstract, sharding
from smart_grpo_jax.hub.pipeline import Pipeline
from smart_grpo_jax.jobs import assemble, evaluate, judges, layout, traced
from smart_grpo_jax.maths import flops
from smart_grpo_jax.policy import credit, rollout, update
from smart_grpo_jax.rewards import base, skeletons
from smart_grpo_jax.runtime.mesh import batch_sharding, replicated, ways_of


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, its abstract arguments, how often it runs, what lies beside it, the images that all runs
    make, the share of epochs that have it, and `compiled`: it as training compiles it where that is not a
    plain jit (a learner gives its state away). `often` is the share of its steps that are searched, None
    without a search: the search is a branch of the program, which Flow-GRPO has, too, and never takes."""

    fn: Callable[..., Any]
    args: tuple[PyTree, ...]
    times: float
    resident: PyTree
    images: int = 0
    share: float = 1.0
    compiled: Any = None
    often: float | None = None

    def jitted(self) -> Any:
        """The function as training compiles it."""
        return self.compiled or jax.jit(self.fn)

    def operations(self, often: float | None = None) -> float:
        """FLOPs of one run on all devices, with another share of searched steps where it is given."""
        shares = (share for share in (often, self.often, 1.0) if share is not None)
        return flops.count(self.fn, *self.args, often=next(shares))


def on_paper(tree: PyTree, where: Any) -> PyTree:
    """Shapes that lie in `where`: one sharding for all leaves, or a tree of them."""
    place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    if isinstance(where, NamedSharding):
        return jax.tree.map(
            lambda a: place(jax.eval_shape(lambda: jnp.asarray(a)) if not hasattr(a, "shape") else a, where),
            tree,
        )
    return jax.tree.map(place, tree, where)


@dataclasses.dataclass(frozen=True)
class Paper:
    """What all programs of a config are made from."""

    config: Config
    mesh: Mesh
    pipe: Pipeline
    judged: judges.Judges
    fns: rollout.Functions
    policy: update.Policy
    times: np.ndarray
    shape: rollout.Shape
    frozen: PyTree
    state: TrainState

    @property
    def everywhere(self) -> NamedSharding:
        """On every device whole."""
        return replicated(self.mesh)

    @property
    def groups(self) -> int:
        """Prompt groups of one rollout call."""
        return assemble.training_calls(self.config, self.mesh)[0]

    @property
    def calls(self) -> int:
        """Rollout calls of an epoch."""
        return assemble.training_calls(self.config, self.mesh)[1]

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return self.config.prompts.groups * self.config.prompts.members

    @property
    def fixed(self) -> dict[str, PyTree]:
        """What a rollout reads beside the policy."""
        return {"decoder": self.pipe.params["vae"], **self.judged.params}

    def conditioning(self, rows: int) -> Conditioning:
        """The embeddings of prompts."""
        model = self.config.model
        return on_paper(abstract.conditioning(model.path, model.t5_length, rows), self.everywhere)


def paper(config: Config, mesh: Mesh) -> Paper:
    """All that assemble.assemble makes, on paper."""
    everywhere, model = replicated(mesh), config.model
    pipe = abstract.pipeline(
        model.path, model.dtype, model.t5_length, tiling=model.tiling, layout=sharding.layout(mesh)
    )
    judged = judges.assemble(config, mesh, skeletons.build, on_paper)
    velocity = assemble.raw_velocity(config, pipe, mesh)
    fns, policy = assemble.functions(config, pipe, velocity, judged, mesh)
    times = assemble.time_grid(config, pipe, config.sampler.steps)
    negative = on_paper(abstract.conditioning(model.path, model.t5_length, 1), everywhere)
    recipe, learned = assemble.recipe(config), assemble.trainable(config, pipe)
    state = jax.eval_shape(partial(update.init_state, recipe), learned)
    return Paper(
        config=config,
        mesh=mesh,
        pipe=pipe,
        judged=judged,
        fns=fns,
        policy=policy,
        times=times,
        shape=assemble.rollout_shape(config, pipe, times),
        frozen={"params": pipe.params["transformer"], "negative": negative},
        state=on_paper(state, layout.of_state(config, pipe, mesh, recipe, learned)),
    )


def rollout_program(p: Paper) -> Program:
    """Act: all steps with their search, decode, score."""
    params = {"policy": p.policy.bind(p.frozen, p.state.params), **p.fixed}
    knobs = traced.rollout_knobs(p.config, p.times, 0)
    fn = partial(rollout.act, p.fns, p.shape)
    rest = {"average": p.state.ema, "optimizer": p.state.opt_state}
    args = (params, on_paper(knobs, p.everywhere), batch(p))
    often = float(np.asarray(knobs.searched)[: p.shape.stop].mean())
    return Program(fn, args, p.calls, rest, p.images, often=often)


def batch(p: Paper) -> rollout.Batch:
    """The prompts of one call."""
    known = prompt_data.load(p.config.prompts.source, p.config.prompts.strict).prompts
    return prompts(p, [known[i % len(known)] for i in range(p.groups)], p.judged.training)


def prompts(p: Paper, texts: Sequence[str], reward: base.Reward) -> rollout.Batch:
    """These prompts as the rows of a call."""
    index = cast(jax.Array, np.zeros(len(texts), np.int32))
    cond, ctx = p.conditioning(len(texts)), (reward.prepare(texts), p.judged.search.prepare(texts))
    return on_paper(rollout.Batch(index, cond, *ctx, index), p.everywhere)


def update_program(p: Paper) -> Program:
    """Learn: passes, optimizer steps, gradient calls."""
    roll = rollout_program(p)
    acted = jax.eval_shape(roll.fn, *roll.args)
    groups = p.groups * p.calls
    masks = traced.credit_masks(p.config, p.times, 0, np.ones(groups, bool))
    # one call more or less of the rollout has the same samples as a whole epoch in one call
    whole = jax.eval_shape(partial(stretched, p.groups, groups, p.shape.members), acted)
    experience = jax.eval_shape(partial(credit.experience, assemble.rule(p.config), p.shape), whole, masks)
    args = (
        p.state,
        p.frozen,
        p.conditioning(groups),
        on_paper(experience, spread_rows(p.mesh, experience)),
        on_paper(traced.update_knobs(p.config, p.times, 0), p.everywhere),
    )
    recipe, where = assemble.recipe(p.config), jax.tree.map(lambda a: a.sharding, p.state)
    compiled = layout.learner(p.policy, recipe, p.mesh, where)
    return Program(partial(update.learn, p.policy, recipe), args, 1, p.fixed, p.images, compiled=compiled)


def evaluate_program(p: Paper) -> Program:
    """Look: the averaged weights along the ODE, in one of the calls of an evaluation."""
    config, members = p.config, p.config.eval.seeds
    run = cast(
        assemble.Run,
        SimpleNamespace(
            config=config,
            shape=p.shape,
            pipeline=p.pipe,
            velocity=assemble.raw_velocity(config, p.pipe, p.mesh),
            fns=p.fns,
            eval_reward=p.judged.evaluation,
            mesh=p.mesh,
        ),
    )
    known = prompt_data.load(config.eval.source, config.prompts.strict, field="eval.source")
    items = prompt_data.evaluation_items(known, config.eval.prompts)
    size, calls = evaluate.groups_per_call(run, len(items))
    times = assemble.time_grid(config, p.pipe, config.sampler.eval_steps)
    knobs = evaluate.eval_knobs(config, times, config.eval.search, evaluate.EVAL_SEED)
    texts = [items[i % len(items)].text for i in range(size)]
    params = {"policy": p.policy.bind(p.frozen, p.state.ema), **p.fixed}
    args = (
        params | {"reward": p.judged.evaluation.params, "search_reward": p.judged.search.params},
        on_paper(knobs, p.everywhere),
        prompts(p, texts, p.judged.evaluation),
    )
    fn = partial(rollout.act, evaluate.eval_functions(run), evaluate.eval_shape(run, config.eval.search))
    rest = {"learned": p.state.params, "optimizer": p.state.opt_state}
    share = 1 / config.eval.every if config.eval.every else 0.0
    often = float(np.asarray(knobs.searched).mean())
    return Program(fn, args, calls, rest, len(items) * members, share, often=often)


def stretched(have: int, want: int, members: int, acted: rollout.Acted) -> rollout.Acted:
    """A rollout of `have` groups as one of `want`."""

    def lie(a: jax.Array) -> jax.Array:
        axis = next((i for i, size in enumerate(a.shape) if size == have * members), None)
        if axis is None:
            return a
        return jnp.zeros((*a.shape[:axis], want * members, *a.shape[axis + 1 :]), a.dtype)

    return jax.tree.map(lie, acted)


def spread_rows(mesh: Mesh, tree: PyTree) -> PyTree:
    """The sharding of samples: rows over the data axes where they divide."""
    ways = ways_of(mesh)

    def lie(a: Any) -> NamedSharding:
        fits = a.ndim > 0 and a.shape[0] % ways == 0
        return batch_sharding(mesh) if fits else replicated(mesh)

    return jax.tree.map(lie, tree)


PROGRAMS: dict[str, Callable[[Paper], Program]] = {
    "rollout": rollout_program,
    "update": update_program,
    "evaluate": evaluate_program,
}
"""The phases of an epoch that are worth planning."""
