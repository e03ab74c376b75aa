import numpy as np
import pytest
from golden_arrays import load

from smart_grpo_jax.maths import schedule

GOLDEN = load("schedules")
# The published code divides by 1000 and shifts in float32; here it is done in float64 and rounded once.
ROUNDING = dict(rtol=3e-7, atol=0)


@pytest.mark.parametrize("name, steps, shift", [("3_n10", 10, 3.0), ("3_n40", 40, 3.0), ("1_n10", 10, 1.0)])
def test_grids_equal_the_published_ones(name, steps, shift):
    np.testing.assert_allclose(schedule.sd3(steps, shift), GOLDEN[f"sd3_shift{name}_sigmas"], **ROUNDING)
    np.testing.assert_allclose(
        1000 * schedule.sd3(steps, shift)[:-1], GOLDEN[f"sd3_shift{name}_timesteps"], **ROUNDING
    )
    for other in ("dance", "linspace1n"):
        np.testing.assert_allclose(
            schedule.linspace(steps, shift), GOLDEN[f"{other}_shift{name}_sigmas"], **ROUNDING
        )


@pytest.mark.parametrize("tokens", [1024, 4096])
@pytest.mark.parametrize("steps", [6, 28])
def test_flux_grid_equals_diffusers(tokens, steps):
    assert schedule.flux_mu(tokens) == pytest.approx(float(GOLDEN[f"flux_seq{tokens}_mu"]), rel=1e-12)
    np.testing.assert_allclose(
        schedule.flux(steps, tokens), GOLDEN[f"flux_seq{tokens}_n{steps}_sigmas"], **ROUNDING
    )


@pytest.mark.parametrize("kind", schedule.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_every_grid_falls_from_one_to_zero(kind, steps):
    t = schedule.times(kind, steps, image_tokens=1024)
    assert t.dtype == np.float32 and t.shape == (steps + 1,)
    assert t[0] == 1 and t[-1] == 0 and (np.diff(t) < 0).all()


def test_last_hop_of_sd3_is_the_same_for_every_step_count():
    for steps in (2, 10, 40):
        assert schedule.sd3(steps)[-2] == pytest.approx(0.00892857, abs=1e-7)


def test_times_passes_the_shift_on():
    np.testing.assert_array_equal(schedule.times("sd3", 10, 1.5), schedule.sd3(10, 1.5))
    np.testing.assert_array_equal(schedule.times("linspace", 10, 1.0), schedule.linspace(10, 1.0))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: schedule.times("sd4", 10), 'try "sd3"'),
        (lambda: schedule.times("flux", 10), "image_tokens=None"),
        (lambda: schedule.sd3(0), "num_steps=0"),
        (lambda: schedule.linspace(4, float("nan")), "shift=nan"),
    ],
)
def test_bad_requests_say_what_was_got(call, words):
    with pytest.raises(ValueError, match=words):
        call()
