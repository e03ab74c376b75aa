"""What training checks after every update."""

import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import NumericsError
from smart_grpo_jax.jobs import guards, traced
from smart_grpo_jax.policy import update

PUBLISHED = np.append(np.linspace(1, 0.001, 10), 0).astype(np.float32)
"""Ten steps as the published scheduler spaces them."""


def config(transition="flow", level=0.7, dtype="float32"):
    values = configs.default()
    values.sampler.transition, values.sampler.noise_level = transition, level
    values.model.dtype = dtype
    return configs.from_dict(values)


def state(skipped=0):
    params = {"w": jnp.zeros(1)}
    fresh = update.init_state(update.Recipe(loss="ppo", transition="flow"), params)
    return fresh._replace(counters={"skipped": skipped, "skipped_in_a_row": skipped})


@pytest.mark.parametrize(
    "transition, level, most", [("flow", 0.7, guards.RATIO_TOLERANCE), ("dance", 0.3, 3e-6)]
)
def test_the_ratio_of_steps_with_much_noise_is_one_to_the_last_bits(transition, level, most):
    assert (
        guards.RATIO_TOLERANCE
        <= guards.tolerance(config(transition, level), PUBLISHED, np.arange(10))
        <= most
    )


def test_a_step_with_hardly_any_noise_may_show_the_roundings_of_the_velocity():
    cps = config("cps", 0.8)
    assert guards.tolerance(cps, PUBLISHED, np.arange(8)) == guards.RATIO_TOLERANCE
    whole = guards.tolerance(cps, PUBLISHED, np.arange(10))
    # more than the 1.4e-5 that a run shows, and still inside the published clip
    assert 2e-5 < whole < traced.PUBLISHED_CLIPS["ppo"]


def test_a_ratio_that_is_not_one_ends_the_run_where_numbers_are_exact():
    guards.check(config(), state(), {"first_ratio_error": 9e-7}, 1e-6)
    with pytest.raises(NumericsError, match="rollout and update disagree"):
        guards.check(config(), state(), {"first_ratio_error": 2e-6}, 1e-6)
    guards.check(config(), state(), {"first_ratio_error": 2e-6})  # later epochs have moved on
    guards.check(config(dtype="bfloat16"), state(), {"first_ratio_error": 1e-3}, 1e-6)
    guards.check(config(), state(), {}, 1e-6)  # a loss without a ratio


def test_gradients_that_are_no_numbers_end_the_run_after_some_in_a_row():
    guards.check(config(), state(guards.BAD_UPDATES - 1), {})
    with pytest.raises(NumericsError, match=r"lower train\.learning_rate"):
        guards.check(config(), state(guards.BAD_UPDATES), {})
