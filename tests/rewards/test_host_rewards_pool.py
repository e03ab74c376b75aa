"""Plain Python as a reward: in batches, in threads, with an end."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Prompt
from smart_grpo_jax.rewards import base, host, mixture

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
PROMPTS = [Prompt(f"p{i}", {"i": i}) for i in range(5)]
IDS = [f"m{i}" for i in range(5)]


def scored(ask, limits=None, parts=()):
    return host.scorer(ask, limits or Host(batch=2, workers=2), parts)(IMAGES, PROMPTS, IDS)


def test_every_image_gets_its_own_answer_whatever_order_the_batches_end_in():
    def ask(batch):
        time.sleep(0.05 if batch.ids[0] == "m0" else 0)
        assert len(batch.prompts) <= 2 and batch.images.dtype == np.uint8
        return [host.Answer(m["i"], parts={"half": m["i"] / 2}) for m in batch.metadata]

    scores = scored(ask, parts=("half",))
    assert scores.value.tolist() == [0, 1, 2, 3, 4] and scores.value.dtype == np.float32
    assert scores.parts["half"].tolist() == [0, 0.5, 1, 1.5, 2] and scores.errors == ("",) * 5


def test_an_exception_costs_the_scores_of_its_batch_alone():
    def ask(batch):
        if "m2" in batch.ids:
            raise ValueError("no face")
        return [host.Answer(1.0)] * len(batch.ids)

    scores = scored(ask)
    np.testing.assert_array_equal(scores.value, [1, 1, np.nan, np.nan, 1])
    assert scores.errors == ("", "", "ValueError: no face", "ValueError: no face", "")


def test_workers_are_shared_by_all_calls_of_a_reward():
    now, most, lock = 0, 0, threading.Lock()

    def ask(batch):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return [host.Answer(1.0)] * len(batch.ids)

    score = host.scorer(ask, Host(batch=1, workers=2))
    host.together([lambda: score(IMAGES, PROMPTS, IDS)] * 3)
    assert most == 2


@pytest.mark.parametrize(
    "value, good",
    [
        (1, True), (np.float32(2.5), True), (np.array(3.0), True), (np.int64(3), True), (None, False),
        (float("nan"), False), (np.inf, False), ("1", False), (True, False), (np.bool_(True), False),
        (np.array([1.0]), False), (1j, False),
    ],
)  # fmt: skip
def test_only_a_finite_number_is_a_score(value, good):
    found, error = host.number(value)
    assert np.isfinite(found) == good and bool(error) != good


def test_no_images_have_no_scores():
    scores = host.scorer(lambda batch: 1 / 0, Host())(IMAGES[:0], [], [])
    assert scores.value.shape == (0,) and scores.errors == ()


def test_scores_are_made_while_the_next_images_come_and_a_full_queue_holds_them_up():
    gate = threading.Event()

    def slow(images, prompts, ids):
        gate.wait(5)
        return base.HostScores(np.full(len(ids), len(ids), np.float32), ("",) * len(ids), {})

    ahead = host.Ahead(slow, limit=2)
    for size in (1, 2):
        ahead.submit(IMAGES[:size], PROMPTS[:size], IDS[:size])  # returns at once
    third = host.begin(lambda: ahead.submit(IMAGES[:3], PROMPTS[:3], IDS[:3]))
    with pytest.raises(TimeoutError):
        third(0.1)
    gate.set()
    third(5)
    assert [scores.value.tolist() for scores in ahead.gather()] == [[1.0], [2.0, 2.0], [3.0, 3.0, 3.0]]


def test_a_mixture_adds_its_host_rewards_and_leaves_the_graph_to_the_graph():
    spec = {"jpeg_compressibility": 10.0, "jpeg_incompressibility": {"weight": 0.0}, "compressibility": 2.0}
    mixed = mixture.mixture(spec)
    scores = mixed.host(IMAGES, PROMPTS, IDS)
    kilobytes = scores.parts["jpeg_incompressibility"]
    np.testing.assert_allclose(scores.value, -10 * kilobytes / 500, rtol=1e-6)  # one float32 rounding
    assert {"jpeg_compressibility", "jpeg_compressibility/kilobytes"} <= set(scores.parts)
    graph = mixed.score(mixed.params, IMAGES / np.float32(255), mixed.prepare(PROMPTS), None)
    assert set(graph.parts) == {"compressibility", "compressibility/kilobytes"}
    np.testing.assert_allclose(graph.value, 2 * graph.parts["compressibility"])


def test_a_missing_summand_makes_the_whole_missing_unless_it_has_no_weight():
    value = lambda numbers, errors: lambda *_: base.HostScores(np.asarray(numbers, np.float32), errors, {})
    rewards = {
        "good": value([1.0, 1.0], ("", "")),
        "bad": value([2.0, np.nan], ("", "gone")),
    }
    scores = host.weighted(rewards, {"good": 1.0, "bad": 3.0})(IMAGES[:2], PROMPTS[:2], IDS[:2])
    np.testing.assert_array_equal(scores.value, [7.0, np.nan])
    assert scores.errors == ("", "bad: gone")
    logged = host.weighted(rewards, {"good": 1.0, "bad": 0.0})(IMAGES[:2], PROMPTS[:2], IDS[:2])
    np.testing.assert_array_equal(logged.value, [1.0, 1.0])
    np.testing.assert_array_equal(logged.parts["bad"], [2.0, np.nan])


def test_jpeg_sizes_are_those_of_the_files_that_pillow_writes():
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, format="JPEG", quality=95)
    small = base.load_reward("jpeg_compressibility")
    large = base.load_reward("jpeg_incompressibility")
    images = IMAGES.astype(np.float32) / 255
    np.testing.assert_allclose(large(images, PROMPTS)[0], len(buffer.getvalue()) / 1000)
    np.testing.assert_allclose(small(images, PROMPTS)[0], -len(buffer.getvalue()) / 500_000, rtol=1e-6)
    assert (
        base.load_reward("jpeg_incompressibility", quality=50.0)(images, PROMPTS)[0]
        < large(images, PROMPTS)[0]
    )


def test_a_host_reward_takes_the_limits_of_the_run_and_its_own_before_them():
    assert base.tightened("red", Host(batch=3), {"workers": 2.0}) == Host(batch=3, workers=2)
    with pytest.raises(UserError, match=r"reward red: timeout: got 0, wanted > 0"):
        base.tightened("red", Host(), {"timeout": 0.0})
    with pytest.raises(UserError, match=r'reward jpeg_compressibility: got option "worker".*try "workers"'):
        base.build("jpeg_compressibility", worker=2)
    with pytest.raises(UserError, match=r'got option "workers", want one of its own'):
        base.build("compressibility", workers=2)


def test_eight_bits_round_half_to_even_and_clamp():
    levels = np.array([-1.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 0.5, 2.0, np.nan, 254.6 / 255], np.float32)
    found = base.eight_bit(np.broadcast_to(levels[:, None, None, None], (8, 1, 1, 3)))
    assert found[:, 0, 0, 0].tolist() == [0, 0, 2, 2, 128, 255, 0, 255]
