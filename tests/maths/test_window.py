import numpy as np
import pytest

from smart_grpo_jax.maths import schedule, window

T = 10


def test_all_leaves_the_last_step_to_the_ode():
    w = window.window("all", T)
    assert w.stochastic.tolist() == [True] * 9 + [False]
    assert w.trained.tolist() == list(range(9)) and w.trained.dtype == np.int32


def test_noise_last_adds_noise_but_no_training():
    w = window.window("all", T, noise_last=True)
    assert w.stochastic.all() and w.trained.tolist() == list(range(9))


@pytest.mark.parametrize("fraction, count", [(0.99, 9), (1.0, 9), (0.5, 5), (0.3, 3), (0.01, 1)])
def test_fraction_trains_the_first_steps(fraction, count):
    w = window.window("fraction", T, fraction=fraction)
    assert w.trained.tolist() == list(range(count)) and w.stochastic.sum() == 9


def test_fixed_is_noisy_and_trained_at_the_same_steps():
    w = window.window("fixed", T, start=1, size=3)
    assert np.flatnonzero(w.stochastic).tolist() == w.trained.tolist() == [1, 2, 3]


def test_random_is_a_function_of_seed_and_epoch_and_reaches_every_place():
    draw = lambda epoch, seed: window.window("random", T, epoch, seed, size=3, high=5).trained
    starts = [int(draw(e, 7)[0]) for e in range(60)]
    assert starts == [int(draw(e, 7)[0]) for e in range(60)]
    assert set(starts) == {0, 1, 2}
    assert starts != [int(draw(e, 8)[0]) for e in range(60)]
    assert max(window.window("random", T, e, 0, size=3).trained[-1] for e in range(60)) == 8


def test_sliding_moves_and_wraps():
    start = lambda epoch, **o: int(window.window("sliding", T, epoch, size=4, every=25, **o).trained[0])
    assert [start(e) for e in (0, 24, 25, 50, 125, 150)] == [0, 0, 1, 2, 5, 0]
    assert [start(e, wraps=False) for e in (125, 150, 10_000)] == [5, 5, 5]
    assert [start(e, stride=2) for e in (0, 25, 50, 75)] == [0, 2, 4, 0]


@pytest.mark.parametrize("kind", window.WINDOWS)
def test_number_of_trained_steps_does_not_depend_on_the_epoch(kind):
    windows = [window.window(kind, T, epoch, seed=3) for epoch in range(200)]
    assert len({w.trained.shape for w in windows}) == 1
    for w in windows:
        assert w.stochastic[w.trained].all() and w.stochastic.dtype == bool and w.stochastic.shape == (T,)


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("slide", {}, 'try "sliding"'),
        ("fixed", {"sise": 2}, 'try "size"'),
        ("all", {"size": 2}, "known: noise_last"),
        ("fixed", {"start": 8, "size": 3}, "start=8, size=3"),
        ("fraction", {"fraction": 0.0}, "got 0.0"),
        ("random", {"size": 3, "low": 4, "high": 6}, "size=3"),
        ("sliding", {"size": 10}, "size=10"),
        ("sliding", {"every": 0}, "every=0"),
    ],
)
def test_bad_options_are_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        window.window(kind, T, **options)


def test_one_step_has_no_window():
    with pytest.raises(ValueError, match="got 1 steps"):
        window.window("all", 1)


def search_steps(spec, times=None, **kw):
    return np.flatnonzero(
        window.step_mask(spec, T, schedule.sd3(T) if times is None else times, **kw)
    ).tolist()


def test_search_steps_by_name():
    assert search_steps("all") == list(range(9))
    assert search_steps("none") == []
    assert search_steps("late") == [6, 7, 8]
    assert search_steps("early") == [2, 3, 4, 5]
    assert search_steps("early", schedule.linspace(T, 1.0)) == [1, 2, 3]


def test_search_steps_stay_inside_the_window():
    noisy = window.window("fixed", T, start=1, size=3).stochastic
    assert search_steps("all", stochastic=noisy) == [1, 2, 3]
    assert search_steps([0, 2, 9], stochastic=noisy) == [2]
    assert search_steps("late", stochastic=np.ones(T, bool)) == [6, 7, 8, 9]


def test_search_steps_by_index():
    assert search_steps([3, 1]) == [1, 3] and search_steps(()) == []
    for bad in ([10], [-1]):
        with pytest.raises(ValueError, match="indices from 0 to 9"):
            search_steps(bad)
    with pytest.raises(ValueError, match='try "late"'):
        search_steps("lated")
