import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_arrays import DOUBLE, load

from smart_grpo_jax.maths import transition, weights

GOLDEN = load("variants")
TRAINED = jnp.arange(9)


def test_stds_and_weights_equal_the_published_ones():
    with jax.enable_x64(True):
        times, level = jnp.asarray(GOLDEN["sigmas"]), float(GOLDEN["noise_level"])
        std = transition.stds("flow", times, level)
        np.testing.assert_allclose(std, GOLDEN["transition_std"], **DOUBLE)
        tempflow = weights.step_weights("tempflow", std, times, TRAINED)
        np.testing.assert_allclose(tempflow[:9], GOLDEN["tempflow_weight"], **DOUBLE)
        guard = weights.step_weights("guard", std, times, TRAINED)
        np.testing.assert_allclose(guard, GOLDEN["guard_step_weight"], **DOUBLE)


def test_tempflow_weights_average_to_one_on_the_trained_steps():
    times = jnp.asarray(GOLDEN["sigmas"], jnp.float32)
    trained = jnp.array([1, 4, 6])
    std = transition.stds("cps", times, 0.7)
    w = weights.step_weights("tempflow", std, times, trained)
    assert float(w[trained].mean()) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(w / w[1], std / std[1], rtol=1e-6)


def test_uniform_weights_are_one():
    times = jnp.asarray(GOLDEN["sigmas"], jnp.float32)
    assert (weights.step_weights("uniform", jnp.zeros(10), times, TRAINED) == 1).all()


def test_an_unknown_weight_names_the_nearest():
    with pytest.raises(ValueError, match='try "tempflow"'):
        weights.step_weights("tempflo", jnp.ones(2), jnp.ones(3), TRAINED)
