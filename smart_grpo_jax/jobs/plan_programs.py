"""The programs of a run without its weights: the functions that training jits, and their arguments as shapes
that lie on a mesh, perhaps of devices that are not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import Conditioning, PyTree, TrainState
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.hub import abstract, sharding
from smart_grpo_jax.hub.pipeline import Pipeline
from smart_grpo_jax.jobs import assemble, judges, traced
from smart_grpo_jax.policy import credit, rollout, update
from smart_grpo_jax.rewards import skeletons
from smart_grpo_jax.runtime.mesh import BATCH_AXES, pad_groups, replicated


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, its abstract arguments, which of them are given away, and how often an epoch runs it."""

    fn: Callable[..., Any]
    args: tuple[PyTree, ...]
    donated: tuple[int, ...]
    times: float
    resident: PyTree

    def jitted(self) -> Any:
        """The function as training compiles it."""
        return jax.jit(self.fn, donate_argnums=self.donated)


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
        prompts = self.config.prompts
        return pad_groups(self.config.memory.rollout or prompts.groups, prompts.members, self.mesh)

    @property
    def calls(self) -> int:
        """Rollout calls of an epoch."""
        return -(-self.config.prompts.groups // self.groups)

    @property
    def fixed(self) -> dict[str, PyTree]:
        """What a rollout reads beside the policy."""
        return {
            "decoder": self.pipe.params["vae"],
            "reward": self.judged.training.params,
            "search_reward": self.judged.search.params,
        }

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
    velocity = assemble.raw_velocity(config, pipe)
    fns, policy = assemble.functions(config, pipe, velocity, judged, mesh)
    times = assemble.time_grid(config, pipe, config.sampler.steps)
    negative = on_paper(abstract.conditioning(model.path, model.t5_length, 1), everywhere)
    recipe = assemble.recipe(config)
    state = jax.eval_shape(partial(update.init_state, recipe), trainable(config, pipe))
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
        state=on_paper(state, everywhere),
    )


def trainable(config: Config, pipe: Pipeline) -> PyTree:
    """What is trained, as float32 shapes."""
    adapter = config.adapter
    if adapter.kind == "full":
        learned = assemble.without(pipe.params["transformer"], pipe.transformer.fixed)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), learned)
    net, _, *inputs = pipe.adapter(adapter.rank, adapter.alpha, adapter.targets)
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)["lora"]


def rollout_program(p: Paper) -> Program:
    """Act: all steps with their search, decode, score."""
    params = {"policy": p.policy.bind(p.frozen, p.state.params), **p.fixed}
    knobs = on_paper(traced.rollout_knobs(p.config, p.times, 0), p.everywhere)
    fn = partial(rollout.act, p.fns, p.shape)
    rest = {"average": p.state.ema, "optimizer": p.state.opt_state}
    return Program(fn, (params, knobs, batch(p)), (), p.calls, rest)


def batch(p: Paper) -> rollout.Batch:
    """The prompts of one call."""
    known = prompt_data.load(p.config.prompts.source, p.config.prompts.strict).prompts
    texts = [known[i % len(known)] for i in range(p.groups)]
    index = cast(jax.Array, np.zeros(p.groups, np.int32))
    made = rollout.Batch(
        index,
        p.conditioning(p.groups),
        p.judged.training.prepare(texts),
        p.judged.search.prepare(texts),
        index,
    )
    return on_paper(made, p.everywhere)


def update_program(p: Paper) -> Program:
    """Learn: passes, optimizer steps, gradient calls."""
    roll = rollout_program(p)
    acted = jax.eval_shape(roll.fn, *roll.args)
    groups = p.config.prompts.groups
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
    fn = partial(update.learn, p.policy, assemble.recipe(p.config))
    return Program(fn, args, (0,), 1, p.fixed)


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
    ways = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))

    def lie(a: Any) -> NamedSharding:
        fits = a.ndim > 0 and a.shape[0] % ways == 0
        return NamedSharding(mesh, PartitionSpec(BATCH_AXES) if fits else PartitionSpec())

    return jax.tree.map(lie, tree)


PROGRAMS: dict[str, Callable[[Paper], Program]] = {"rollout": rollout_program, "update": update_program}
"""The phases of an epoch that are worth planning."""
