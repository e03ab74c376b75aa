import jax
import jax.numpy as jnp
import numpy as np
from golden_arrays import DOUBLE, load

from smart_grpo_jax.maths import ema

GOLDEN = load("grpo")


def test_decay_equals_flow_grpo():
    with jax.enable_x64(True):
        np.testing.assert_allclose(ema.decay(GOLDEN["ema_step"]), GOLDEN["ema_decay"], **DOUBLE)


def test_trajectory_equals_flow_grpo():
    """The average of a scalar that equals the step, s = 1..80."""
    with jax.enable_x64(True):
        average, seen = jnp.float64(0), []
        for s in range(1, 81):
            if ema.due(s):
                average = ema.update(average, jnp.float64(s), ema.decay(s))
            seen.append(float(average))
    # Theirs is a float32 parameter: one rounding of 6e-8 for each update, never more than a few.
    np.testing.assert_allclose(seen, GOLDEN["ema_traj_param_equals_step"], rtol=3e-7)


def test_due_ends_every_stretch():
    assert [s for s in range(30) if ema.due(s)] == [7, 15, 23]
    assert [s for s in range(6) if ema.due(s, every=1)] == list(range(6))


def test_update_goes_leaf_by_leaf_and_keeps_dtypes():
    old = {"a": jnp.ones(2), "b": {"c": jnp.zeros(3, jnp.bfloat16)}}
    new = {"a": jnp.zeros(2), "b": {"c": jnp.ones(3, jnp.float32)}}
    mixed = ema.update(old, new, 0.75)
    np.testing.assert_allclose(mixed["a"], 0.75)
    np.testing.assert_allclose(np.asarray(mixed["b"]["c"], np.float32), 0.25)
    assert mixed["b"]["c"].dtype == jnp.bfloat16
