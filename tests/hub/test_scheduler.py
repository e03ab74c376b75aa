"""Time grids: those of diffusers' scheduler, as its pipelines call it."""

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.scheduler import Scheduler

SD35 = {"num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {
    **SD35,
    "use_dynamic_shifting": True,
    "base_shift": 0.4,
    "max_shift": 1.3,
    "max_image_seq_len": 2048,
}
SCHNELL = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}


@pytest.mark.torch
@pytest.mark.parametrize("config", [SD35, DYNAMIC, SCHNELL])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("steps", "tokens"), [(10, 1024), (28, 4096), (3, 77)])
def test_the_grid_is_that_of_diffusers(config, given, steps, tokens):
    import diffusers
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    c = theirs.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    mu = mu if config.get("use_dynamic_shifting") else None
    if given:
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        theirs.set_timesteps(steps, mu=mu)
    ours = Scheduler.from_json(dict(c)).times(steps, tokens, given)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=2e-7)  # float32 rounding of a float64 grid


def test_a_shift_of_ones_own_replaces_the_schedulers():
    fixed = Scheduler.from_json({**SD35, "shift": 2.0})
    for given in (True, False):
        np.testing.assert_array_equal(
            Scheduler.from_json(DYNAMIC).times(7, 100, given, shift=2.0), fixed.times(7, 100, given)
        )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift_terminal": 0.1}, "shift_terminal"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"time_shift_type": "linear"}, "time_shift_type"),
    ],
)
def test_a_way_to_place_the_times_that_is_not_built_is_refused(change, match):
    with pytest.raises(UserError, match=match):
        Scheduler.from_json({**SD35, **change})
