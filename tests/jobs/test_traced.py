"""What changes from epoch to epoch without a recompilation."""

import numpy as np
import pytest

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import traced
from smart_grpo_jax.maths import schedule

TIMES = schedule.times("linspace", 10)


def made(**changes):
    values = configs.default()
    for name, value in changes.items():
        section, field = name.split("__")
        values[section][field] = value
    return configs.from_dict(values)


def test_the_learning_rate_halves_in_its_half_life_and_stays_without_one():
    config = made(train__learning_rate=8e-4, train__half_life=10.0)
    rates = [traced.learning_rate(config, epoch) for epoch in (0, 10, 30)]
    assert rates == pytest.approx([8e-4, 4e-4, 1e-4])
    assert float(traced.update_knobs(config, TIMES, 10).learning_rate) == pytest.approx(4e-4)
    steady = made(train__learning_rate=8e-4)
    assert traced.learning_rate(steady, 1000) == 8e-4


def test_the_search_stops_after_its_epochs_in_rollout_and_credit_alike():
    config = made(search__steps="early", search__until=3)
    real = np.ones(2, bool)
    for epoch, searched in ((0, True), (2, True), (3, False), (9, False)):
        assert bool(traced.rollout_knobs(config, TIMES, epoch).searched.any()) == searched
        assert bool(traced.credit_masks(config, TIMES, epoch, real).searched.any()) == searched
    assert traced.rollout_knobs(made(search__steps="early"), TIMES, 999).searched.any()


def test_local_credit_cannot_outlive_the_search():
    with pytest.raises(UserError, match=r"search\.until"):
        made(search__credit="local", search__until=3)
