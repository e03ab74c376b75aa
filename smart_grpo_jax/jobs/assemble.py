"""From a config to the programs and the data of a run: what all jobs share.

`assemble` loads the pipeline, lays it over the mesh and binds the model, the rewards and the prompts into
the arguments of policy/'s programs; traced.py makes what is traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.contradictions import LIKELIHOOD, MOVING
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Conditioning, PyTree, TrainState
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.data.embeddings import Embeddings
from smart_grpo_jax.hub import adapters, sharding
from smart_grpo_jax.hub import pipeline as hub
from smart_grpo_jax.hub.functions import RawVelocity
from smart_grpo_jax.jobs import embed, judges, layout, traced
from smart_grpo_jax.maths import rng, schedule
from smart_grpo_jax.models import attention, lora
from smart_grpo_jax.policy import credit, rollout, update
from smart_grpo_jax.rewards import base, mixture
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.mesh import make_mesh, pad_groups, replicated, ways_of


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loops need, assembled."""

    config: Config
    mesh: Mesh
    pipeline: hub.Pipeline
    embeddings: Embeddings
    velocity: RawVelocity
    prompts: prompt_data.PromptSet
    eval_items: list[prompt_data.Item]
    reward: base.Reward
    search_reward: base.Reward
    eval_reward: base.Reward
    frozen: PyTree
    fixed: dict[str, PyTree]
    fns: rollout.Functions
    policy: update.Policy
    recipe: update.Recipe
    rule: credit.Rule
    times: np.ndarray
    shape: rollout.Shape

    def state(self) -> TrainState:
        """The state before the first epoch."""
        config = self.config
        if config.adapter.kind == "full":
            learned = without(self.frozen["params"], self.pipeline.transformer.fixed)
            # One program, so that no leaf ever lies whole on a device.
            return jax.jit(partial(first_state, self.recipe), out_shardings=self.where())(learned)
        adapter = self.pipeline.adapter(config.adapter.rank, config.adapter.alpha, config.adapter.targets)
        key = jax.random.fold_in(rng.key(config.seed, "init"), 1)
        params = lora.init_lora(key, *adapter)
        if config.adapter.init:
            params = self.started(params)
        return distributed.place(update.init_state(self.recipe, params), replicated(self.mesh))

    def where(self) -> TrainState:
        """How the state lies on the mesh."""
        learned = trainable(self.config, self.pipeline)
        return layout.of_state(self.config, self.pipeline, self.mesh, self.recipe, learned)

    def started(self, fresh: PyTree) -> PyTree:
        """Adapters that begin where those of `adapter.init` end."""
        adapter, pipe = self.config.adapter, self.pipeline
        file = adapters.find(Path(adapter.init))
        tree = adapters.read(file, pipe.weights_table, pipe.transformer)
        return adapters.start(file, tree, fresh, adapter.alpha / adapter.rank)

    def rollout_params(self, trainable: PyTree) -> dict[str, PyTree]:
        """What `act` takes: the policy with these weights, and the frozen rest."""
        return {"policy": self.policy.bind(self.frozen, trainable), **self.fixed}


def assemble(
    config: Config,
    items: Sequence[prompt_data.Item] | None = None,
    lora: str | None = None,
    training: bool = True,
) -> Run:
    """Load, build and lay out; the first thing here that touches a device.

    Prompts are embedded first, and the text encoders are gone before the transformer is loaded. `items`
    replaces the prompts of an evaluation; the adapters of `lora` are folded into the base; without
    `training` the prompts of the epochs are left out.
    """
    judges.greet(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    chosen_attention(config, mesh)  # a choice that cannot run is refused before gigabytes are read
    strict = config.prompts.strict
    prompts = prompt_data.load(config.prompts.source, strict)
    if items is None:
        held_out = prompt_data.load(config.eval.source, strict, field="eval.source")
        items = prompt_data.evaluation_items(held_out, config.eval.prompts)
    epochs = config.train.epochs if training else 0
    embeddings = embed.embed(config, prompts, [item.text for item in items], epochs)
    pipe = hub.load_pipeline(
        config.model.path,
        dtype=config.model.dtype,
        lora=lora,
        t5_length=config.model.t5_length,
        text=False,
        tiling=config.model.tiling,
        layout=sharding.layout(mesh),
    )
    pipe.check_negative(config.prompts.negative)
    judged = judges.assemble(config, mesh)
    velocity = raw_velocity(config, pipe, mesh)
    fns, policy = functions(config, pipe, velocity, judged, mesh)
    times = time_grid(config, pipe, config.sampler.steps)
    negative = distributed.place(embeddings.rows([config.prompts.negative]), replicated(mesh))
    return Run(
        config=config,
        mesh=mesh,
        pipeline=pipe,
        embeddings=embeddings,
        velocity=velocity,
        prompts=prompts,
        eval_items=list(items),
        reward=judged.training,
        search_reward=judged.search,
        eval_reward=judged.evaluation,
        frozen={"params": pipe.params["transformer"], "negative": negative},
        fixed={"decoder": pipe.params["vae"], **judged.params},
        fns=fns,
        policy=policy,
        recipe=recipe(config),
        rule=rule(config),
        times=times,
        shape=rollout_shape(config, pipe, times),
    )


def trainable(config: Config, pipe: hub.Pipeline) -> PyTree:
    """What is trained, as float32 shapes."""
    adapter = config.adapter
    if adapter.kind == "full":
        learned = without(pipe.params["transformer"], pipe.transformer.fixed)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), learned)
    net, _, *inputs = pipe.adapter(adapter.rank, adapter.alpha, adapter.targets)
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)["lora"]


def first_state(recipe: update.Recipe, learned: PyTree) -> TrainState:
    """The state before the first epoch where all weights are trained: in float32."""
    return update.init_state(recipe, jax.tree.map(lambda a: jnp.array(a, jnp.float32), learned))


def time_grid(
    config: Config, pipe: hub.Pipeline, steps: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Times 1 … 0 for this many steps, for pictures of `size` pixels (None: the run's)."""
    pixels = size or config.model.resolution or None
    kind, shift = config.sampler.schedule, config.sampler.shift
    if kind == "model":
        return pipe.times(steps, pixels, shift)
    tokens = pipe.image_tokens(pixels)
    return schedule.times(kind, steps, shift=shift or pipe.shift(pixels), image_tokens=tokens)


def raw_velocity(config: Config, pipe: hub.Pipeline, mesh: Mesh) -> RawVelocity:
    """The network with the adapter where there is one: without it, it is the reference. Its batch lies over
    the mesh, however its rows came together."""
    adapter, net = config.adapter, pipe.transformer
    rank = adapter.rank if adapter.kind == "lora" else 0
    chosen = chosen_attention(config, mesh, net.attention_head_dim)
    network = partial(pipe.velocity_fn, remat=config.memory.remat, attention=chosen)
    adapted, plain = network(rank, adapter.alpha, adapter.targets), network()

    def velocity(params: PyTree, x: Any, t: Any, cond: Conditioning, scale: Any = None, /) -> Any:
        return (adapted if params["lora"] else plain)(params, x, t, cond, scale)

    return layout.laid(mesh, velocity)


def chosen_attention(config: Config, mesh: Mesh, width: int = 64) -> str:
    """What `model.attention` means on the devices of the mesh, for heads of `width` features."""
    aim = attention.target(mesh.devices.flat[0], config.model.dtype, width)
    return attention.choose(config.model.attention, aim)


def functions(
    config: Config,
    pipe: hub.Pipeline,
    velocity: RawVelocity,
    judged: judges.Judges,
    mesh: Mesh,
) -> tuple[rollout.Functions, update.Policy]:
    """Velocities with their guidance, decoder and rewards as pure functions."""
    scale = config.sampler.guidance
    in_search = config.search.guidance if config.search.guidance >= 0 else scale
    constrain, ways = partial(layout.spread, mesh), ways_of(mesh)

    def bind(frozen: PyTree, trainable: PyTree) -> PyTree:
        if config.adapter.kind == "full":
            learned = {**frozen, "params": together(frozen["params"], trainable), "lora": {}}
            return learned | ({"base": frozen["params"]} if config.search.forecast == "base" else {})
        return {**frozen, "lora": trainable}

    reference = lambda bound: {**bound, "params": bound.get("base", bound["params"]), "lora": {}}
    guided, search = pipe.guided(velocity, scale), pipe.guided(velocity, in_search)
    untrained = lambda params, *rest: search(reference(params), *rest)
    fns = rollout.Functions(
        velocity=guided,
        search_velocity=untrained if config.search.forecast == "base" else search,
        decode=layout.laid(mesh, pipe.decode_fn()),
        score=layout.laid(mesh, judged.training.score),
        search_score=layout.laid(mesh, judged.search.score),
        prefer=mixture.prefer(config.search_reward or config.rewards, config.search.combine),
        constrain=constrain,
        ways=ways,
    )
    return fns, update.Policy(guided, pipe.unguided(velocity, scale), bind, reference, constrain, ways)


def without(params: PyTree, fixed: Sequence[str]) -> PyTree:
    """The parameters that are learned: a stored table of positions is data, which weight decay must not
    touch."""
    return unflatten_dict({k: v for k, v in flatten_dict(params, sep="/").items() if k not in fixed}, sep="/")


def together(params: PyTree, learned: PyTree) -> PyTree:
    """All parameters, the learned ones in the place of their first values."""
    return unflatten_dict(flatten_dict(params, sep="/") | flatten_dict(learned, sep="/"), sep="/")


def recipe(config: Config) -> update.Recipe:
    """The static part of the update."""
    t = config.train
    return update.Recipe(
        loss=t.loss,
        transition=config.sampler.transition,
        log_prob=t.log_prob,
        kl=t.kl,
        use_kl=t.kl_weight > 0,
        updates=t.updates_per_epoch,
        passes=t.inner_epochs,
        chunk=config.memory.train,
        adv_clip=t.adv_clip,
        actor=t.actor,
        nft_beta=t.nft_beta,
        awm_weight=t.awm_weight,
        grad_clip=t.grad_clip,
        beta2=t.beta2,
        ema_every=t.ema.every,
    )


def rule(config: Config) -> credit.Rule:
    """The static part of the credit."""
    t = config.train
    weights = {name: schema.weight_of(entry) for name, entry in config.rewards.items()}
    return credit.Rule(
        kind=config.search.credit
        if searched_steps(config) or config.search.credit == "difference"
        else "none",
        scope=t.adv_scope,
        clip=t.adv_clip,
        combine=t.adv_combine,
        weights=tuple((name, weight) for name, weight in weights.items() if weight),
        likelihood=t.loss in LIKELIHOOD,
    )


def rollout_shape(config: Config, pipe: hub.Pipeline, times: np.ndarray) -> rollout.Shape:
    """The static part of the rollout. With local credit it stops after the last searched step."""
    s, steps = config.search, config.sampler.steps
    stop = steps
    mask = traced.search_mask(config, times, traced.epoch_window(config, 0).stochastic)
    if searched_steps(config) and config.sampler.window.kind not in MOVING and not mask.any():
        grid = ", ".join(f"{t:.2f}" for t in times[:-1])
        raise UserError(f"search.steps: got {s.steps}, wanted at least one noisy step (t = {grid})")
    if s.credit == "local" and searched_steps(config):
        stop = int(np.flatnonzero(mask)[-1]) + 1
    return rollout.Shape(
        latent=pipe.latent_shape(config.model.resolution or None),
        members=config.prompts.members,
        steps=steps,
        stop=stop,
        transition=config.sampler.transition,
        log_prob=config.train.log_prob,
        space=s.space,
        searched_members=round(s.members * config.prompts.members),
        lookahead=s.lookahead,
        chunk=s.chunk,
        one_step_rewards=s.credit == "difference",
        decode_chunk=config.memory.decode,
        reward_chunk=config.memory.reward,
        same_latent=config.prompts.same_latent,
    )


def evaluated_at_once(config: Config, members: int) -> int:
    """Prompts of `members` images that make as many images as memory.rollout allows; 0: no limit."""
    allowed = config.memory.rollout * config.prompts.members
    return max(1, allowed // members) if allowed else 0


def groups_per_call(run: Run, groups: int, members: int, chunk: int) -> tuple[int, int]:
    """(groups in one call, calls): padded so that images divide over the devices."""
    size = pad_groups(chunk or groups, members, run.mesh)
    return size, -(-groups // size)


def training_calls(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(groups in one rollout call, calls of an epoch). Where one call is the epoch, the images of each
    optimizer step divide over the devices, too."""
    groups, members, size = config.prompts.groups, config.prompts.members, config.memory.rollout
    whole = size in (0, groups)
    size = pad_groups(size or groups, members, mesh, config.train.updates_per_epoch if whole else 1)
    return size, -(-groups // size)


def make_batch(
    run: Run,
    texts: Sequence[str],
    size: int,
    reward: base.Reward,
    ids: Sequence[int],
    first_member: Sequence[int] = (),
) -> tuple[rollout.Batch, np.ndarray]:
    """The prompts of one call, filled up to `size` groups with copies of the first; True where real.

    The noise of a group follows from its id (its place in a training epoch, its text in an evaluation)
    and from the index of its first member.
    """
    spare = size - len(texts)
    filled = [*texts, *[texts[0]] * spare]
    members = list(first_member) or [0] * len(texts)
    batch = rollout.Batch(
        cast(jax.Array, np.asarray([*ids, *[ids[0]] * spare], np.int32)),
        run.embeddings.conditioning(filled),
        reward.prepare(filled),
        run.search_reward.prepare(filled),
        cast(jax.Array, np.asarray([*members, *[0] * spare], np.int32)),
    )
    return distributed.place(batch, replicated(run.mesh)), np.arange(size) < len(texts)
