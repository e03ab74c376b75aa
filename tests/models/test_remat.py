"""What the backward pass recomputes changes memory and time, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core.types import Conditioning
from smart_grpo_jax.hub import functions, weights
from smart_grpo_jax.models.flux import FluxConfig
from smart_grpo_jax.models.mmdit import MMDiTConfig

# Deep for their width, so that what the layers keep outweighs everything else.
CONFIGS = {
    "sd3": MMDiTConfig.from_json(
        dict(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=10, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
            pos_embed_max_size=8, dual_attention_layers=[0, 1, 2, 3], qk_norm="rms_norm",
        )
    ),
    "flux": FluxConfig.from_json(
        dict(
            in_channels=16, num_layers=4, num_single_layers=6, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=6, guidance_embeds=True, axes_dims_rope=[2, 2, 4],
        )
    ),
}  # fmt: skip
SHAPES = {"sd3": weights.mmdit_shapes, "flux": weights.flux_shapes}
RANK, ALPHA = 3, 6.0


def random(shapes, seed):
    """Every leaf random and of unit gain, also the b of an adapter, which begins at 0."""
    rng = np.random.default_rng(seed)

    def leaf(s):
        return (rng.standard_normal(s.shape) / np.sqrt(s.shape[-2] if len(s.shape) > 1 else 25)).astype("f4")

    return jax.tree.map(leaf, shapes)


def arguments(name):
    """Adapters, parameters and a batch of 8 images of 64 tokens."""
    config, rng = CONFIGS[name], np.random.default_rng(2)
    net = functions.network(config, rank=RANK, alpha=ALPHA, targets=())
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in weights.inputs_of(config)]
    adapters = jax.eval_shape(net.init, jax.random.key(0), *shapes)["lora"]
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    cond = Conditioning(normal(8, 5, config.joint_attention_dim), normal(8, config.pooled_projection_dim))
    x = normal(8, 16, 16, config.latent_channels)
    return random(adapters, 0), random(SHAPES[name](config), 1), x, np.linspace(0.1, 0.9, 8, dtype="f4"), cond


def loss(velocity, trained, adapters, params, x, t, cond):
    """A loss of all outputs, and its gradient by adapters or by all parameters."""

    def value(learned):
        bound = {"params": params, "lora": adapters} | {trained: learned}
        return jnp.square(velocity(bound, x, t, cond, 3.5)).mean()

    return jax.value_and_grad(value)({"params": params, "lora": adapters}[trained])


@functools.cache
def result(name, remat, trained):
    """(loss, gradient, bytes of temporaries) of a compiled gradient."""
    velocity = functions.velocity_fn(CONFIGS[name], rank=RANK, alpha=ALPHA, remat=remat)
    given = arguments(name)
    program = jax.jit(functools.partial(loss, velocity, trained)).lower(*given).compile()
    return (*program(*given), program.memory_analysis().temp_size_in_bytes)


CASES = pytest.mark.parametrize(("name", "trained"), [("sd3", "lora"), ("flux", "params")])
pytestmark = pytest.mark.slow  # six gradients are compiled


@CASES
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_loss_and_gradient_do_not_depend_on_it(name, trained, remat):
    """The recomputed numbers are the same operations on the same arrays; XLA may fuse them otherwise, so that
    sums round otherwise: a few last bits (6e-8) per layer, of the largest entry of a leaf."""
    (value, gradient, _), (again, recomputed, _) = result(name, "none", trained), result(name, remat, trained)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(recomputed), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), 1e-6))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient)) or name == "sd3"


@CASES
def test_memory_falls_with_what_is_recomputed(name, trained):
    none, dots, full = (result(name, remat, trained)[2] for remat in ("none", "dots", "full"))
    assert dots < 0.8 * none and full < 0.8 * dots, (none, dots, full)
