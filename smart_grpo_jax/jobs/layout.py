"""How batches and the trained state lie on the mesh.

Batches: their rows over data × fsdp. Adapters and their optimizer: whole on every device, so that only
gradients are summed. All weights (`adapter.kind = full`): the float32 weights, their average and Adam's
moments are cut along `fsdp` and `tensor` as the weights themselves are (ZeRO-3): a layer is gathered where
it is used, and its gradient is summed into its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import PyTree, TrainState
from smart_grpo_jax.hub import sharding
from smart_grpo_jax.hub.pipeline import Pipeline
from smart_grpo_jax.policy import update
from smart_grpo_jax.runtime.mesh import batch_sharding, replicated, ways_of


def spread(mesh: Mesh, tree: PyTree) -> PyTree:
    """Lay the leading (batch) axis of every leaf over the data axes, where it divides."""
    devices = ways_of(mesh)

    def lay(a: Any) -> Any:
        if devices == 1 or jnp.ndim(a) == 0 or a.shape[0] % devices:
            return a
        return jax.lax.with_sharding_constraint(a, batch_sharding(mesh))

    return jax.tree.map(lay, tree)


def laid(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(params, batch, ...)` with the rows of its batch, and of what it returns, over the data axes.

    A gather or a join of rows may leave a batch anywhere, and the compiler then follows it through the whole
    network. Inside, the mesh is known to kernels that must be cut by hand.
    """

    @wraps(fn)
    def on_mesh(params: PyTree, *batch: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return spread(mesh, fn(params, *spread(mesh, batch)))

    return on_mesh


def of_state(config: Config, pipe: Pipeline, mesh: Mesh, recipe: update.Recipe, params: PyTree) -> TrainState:
    """The NamedSharding of every leaf of the state that starts from `params` (arrays or shapes)."""
    everywhere = replicated(mesh)
    state = jax.eval_shape(partial(update.init_state, recipe), params)
    whole = jax.tree.map(lambda _: everywhere, state)
    if config.adapter.kind != "full":
        return whole
    place = sharding.layout(mesh)(pipe.family.networks["transformer"], pipe.transformer)
    cut = unflatten_dict({path: place(path) for path in flatten_dict(params, sep="/")}, sep="/")
    moments = optax.tree_utils.tree_map_params(
        update.optimizer(recipe),
        lambda _, where: where,
        state.opt_state,
        cut,
        transform_non_params=lambda _: everywhere,
    )
    return whole._replace(params=cut, ema=cut, opt_state=moments)


def learner(
    policy: update.Policy, recipe: update.Recipe, mesh: Mesh, where: TrainState
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """`update.learn`, compiled. The new state takes the old one's memory: without its layout being said, the
    compiler may choose another, and then nothing can be reused."""
    learn = partial(update.learn, policy, recipe)
    return jax.jit(learn, donate_argnums=0, out_shardings=(where, replicated(mesh)))
