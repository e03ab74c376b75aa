"""A server that fails in every way we could think of: each batch ends in time, and no score is made up."""

import json
import time

import numpy as np
import pytest
import scripted_server as bad
from scripted_server import Scripted

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Prompt
from smart_grpo_jax.rewards import base, mixture, remote, wire

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
PROMPTS = [Prompt(f"prompt {i}", {"number": i}) for i in range(4)]
IDS = [f"e1/p0/m{i}" for i in range(4)]
LIMITS = Host(batch=4, workers=2, timeout=0.3, deadline=2.0, retries=2)
IN_TIME = 2.5
"""Seconds within which every case must end: the deadline of a batch and the machine's jitter."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(wire, "FIRST_PAUSE", 0.01)


def ask(server, limits=LIMITS, **options):
    """Scores of four images, and how long they took."""
    reward = base.build("remote", limits=limits, url=server.url, **options)
    started = time.monotonic()
    scores = reward.host(IMAGES, PROMPTS, IDS)
    assert time.monotonic() - started < IN_TIME
    return scores


# script of the server | missing scores, of 4 | what the reason says | requests that it got
CASES = {
    "hangs": (bad.hang, 4, "no answer within 0.3 s (3 attempts)", 3),
    "drips a byte at a time": (bad.drip, 4, "no answer within 0.3 s (3 attempts)", 3),
    "drops the connection": (bad.drop, 4, "no JSON but '{\"scores\"' (3 attempts)", 3),
    "hangs once": (bad.first(bad.hang), 0, "", 2),
    "answers no JSON": (bad.answers(lambda r: b"<html>proxy"), 4, "no JSON but '<html>proxy' (3", 3),
    "answers JSON of another kind": (bad.answers(lambda r: ["a"]), 4, 'no list "scores"', 1),
    "nests without end": (bad.answers(lambda r: b"[" * 60_000), 4, "no JSON", 3),
    "500 once": (bad.first(bad.status(500)), 0, "", 2),
    "500 always": (bad.status(500), 4, "status 500: out of order (3 attempts)", 3),
    "503 once": (bad.first(bad.status(503)), 0, "", 2),
    "503 and a time after the deadline": (bad.status(503, Retry_After="60"), 4, "status 503", 1),
    "400": (bad.status(400), 4, "status 400: out of order", 1),
    "NaN": (bad.answers(lambda r: {"scores": bad.rows(r, float("nan"))}), 4, "got score nan", 1),
    "infinity": (bad.answers(lambda r: {"scores": bad.rows(r, float("-inf"))}), 4, "got score -inf", 1),
    "null for some": (
        bad.answers(lambda r: {"scores": [*bad.rows(r)[:3], {"id": IDS[3], "score": None}]}),
        1, "no score", 1,
    ),
    "an error for some": (
        bad.answers(lambda r: {"scores": [*bad.rows(r)[:3], {"id": IDS[3], "error": "no face"}]}),
        1, "the server says: no face", 1,
    ),
    "text as a score": (bad.answers(lambda r: {"scores": bad.rows(r, "0.5")}), 4, "got score '0.5'", 1),
    "true as a score": (bad.answers(lambda r: {"scores": bad.rows(r, True)}), 4, "got score True", 1),
    "too few": (bad.answers(lambda r: {"scores": bad.rows(r)[:3]}), 4, "got 3 scores for 4 images", 1),
    "too many": (bad.answers(lambda r: {"scores": bad.rows(r) * 2}), 4, "got 8 scores for 4 images", 1),
    "one id twice": (
        bad.answers(lambda r: {"scores": bad.rows(r)[:3] + bad.rows(r)[:1]}), 4, "two scores for one id", 1,
    ),
    "a strange id": (
        bad.answers(lambda r: {"scores": [*bad.rows(r)[:3], {"id": "x", "score": 1}]}),
        4, "got a score for id 'x'", 1,
    ),
    "a huge answer": (bad.answers(lambda r: b" " * 300_000), 4, "more than 131,072 bytes", 1),
    "elsewhere": (bad.status(302, Location="http://127.0.0.1:1/"), 4, "moved to 'http://127.0.0.1:1/'", 1),
}  # fmt: skip


@pytest.mark.parametrize("script, missing, says, requests", CASES.values(), ids=CASES)
def test_a_bad_server_costs_scores_and_never_makes_them_up(script, missing, says, requests):
    with Scripted(script) as server:
        scores = ask(server)
        assert np.isnan(scores.value).sum() == missing
        assert (scores.value[~np.isnan(scores.value)] == 0.5).all()
        assert sum(map(bool, scores.errors)) == missing
        assert says in max(scores.errors)
        assert server.asked == requests


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks():
    with Scripted(bad.first(bad.status(429, Retry_After="1"))) as server:
        started = time.monotonic()
        assert np.isfinite(ask(server).value).all() and time.monotonic() - started >= 1.0


def test_a_server_that_is_down_at_the_start_is_one_line():
    port = bad.free_port()
    with pytest.raises(UserError, match=rf"no server answers at http://127.0.0.1:{port}/health: Connection"):
        base.build("remote", url=f"http://127.0.0.1:{port}")


def test_a_server_that_dies_in_the_middle_costs_the_scores_after_it(monkeypatch):
    with Scripted() as server:
        reward = base.build("remote", limits=LIMITS, url=server.url)
        assert np.isfinite(reward.host(IMAGES, PROMPTS, IDS).value).all()
        server.stop()
        scores = reward.host(IMAGES, PROMPTS, IDS)
        assert np.isnan(scores.value).all() and "ConnectionRefusedError" in scores.errors[0]
        server.again()


def test_the_circuit_opens_after_failed_batches_and_closes_with_the_first_answer():
    one = Host(batch=1, workers=1, timeout=0.3, deadline=1.0, retries=1)
    with Scripted(bad.status(500)) as server:
        reward = base.build("remote", limits=one, url=server.url, breaker=2, cooldown=0.3)
        scores = reward.host(IMAGES, PROMPTS, IDS)
        assert server.asked == 4  # two batches with two attempts; the other two were not asked
        assert ["not asked, 2 batches failed in a row" in e for e in scores.errors] == [
            False,
            False,
            True,
            True,
        ]
        time.sleep(0.35)
        again = reward.host(IMAGES, PROMPTS, IDS)
        assert server.asked == 5  # one batch tried once, and failed
        assert np.isnan(again.value).all()
        server.script = bad.well
        assert np.isnan(reward.host(IMAGES, PROMPTS, IDS).value).all() and server.asked == 5
        time.sleep(0.35)
        assert np.isfinite(reward.host(IMAGES, PROMPTS, IDS).value).all() and server.asked == 9


def test_only_one_batch_tries_whether_the_server_is_back():
    def slow(handler, request, number):
        time.sleep(0.1)
        bad.status(500)(handler, request, number)

    once = Host(batch=1, workers=4, timeout=1.0, deadline=2.0, retries=0)
    with Scripted(slow) as server:
        reward = base.build("remote", limits=once, url=server.url, breaker=1, cooldown=0.2)
        reward.host(IMAGES, PROMPTS, IDS)
        before = server.asked
        time.sleep(0.25)
        scores = reward.host(IMAGES, PROMPTS, IDS)  # four at the same time
        assert server.asked == before + 1 and np.isnan(scores.value).all()


def test_scores_find_their_images_by_id_in_any_order():
    def backwards(request):
        return {"scores": [{"id": name, "score": i} for i, name in reversed(list(enumerate(IDS)))]}

    with Scripted(bad.answers(backwards)) as server:
        assert ask(server).value.tolist() == [0, 1, 2, 3]


def test_a_server_that_says_no_does_not_open_the_circuit():
    one = Host(batch=1, workers=1, timeout=0.3, deadline=1.0, retries=1)
    with Scripted(bad.status(400)) as server:
        reward = base.build("remote", limits=one, url=server.url, breaker=1)
        assert np.isnan(reward.host(IMAGES, PROMPTS, IDS).value).all() and server.asked == 4


def test_a_request_holds_exact_pixels_prompts_and_metadata_under_one_id_in_all_attempts():
    with Scripted(bad.first(bad.status(500))) as server:
        ask(server)
        (path, one, headers), (_, two, _) = server.seen
        assert path == "/score" and one == two and len(one["id"]) == 32 and one["reward"] == "only"
        assert "Authorization" not in headers
        from smart_grpo_jax.rewards.server import picture

        for item, image, prompt, name in zip(one["items"], IMAGES, PROMPTS, IDS, strict=True):
            np.testing.assert_array_equal(picture(item["image"], 64), image)
            assert (item["id"], item["prompt"], item["metadata"]) == (name, str(prompt), prompt.metadata)


def test_batches_are_scored_at_the_same_time_and_no_more_than_there_are_workers():
    now, most = 0, 0

    def slow(handler, request, number):
        nonlocal now, most
        with server.lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with server.lock:
            now -= 1
        bad.well(handler, request, number)

    with Scripted(slow) as server:
        scores = ask(server, Host(batch=1, workers=2, timeout=1.0))
        assert np.isfinite(scores.value).all() and server.asked == 4 and most == 2


def test_parts_that_were_asked_for_are_logged_whatever_the_server_leaves_out():
    def some(request):
        made = bad.rows(request)
        for i, row in enumerate(made):
            row["parts"] = {"a": i, "c": 9.0} if i else {}
        return {"scores": made}

    with Scripted(bad.answers(some)) as server:
        scores = ask(server, parts="a, b")
        assert set(scores.parts) == {"a", "b"} and np.isnan(scores.parts["b"]).all()
        np.testing.assert_array_equal(scores.parts["a"], [np.nan, 1, 2, 3])


def test_the_key_comes_from_the_environment_and_is_in_no_message(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "hidden-1234")
    with Scripted(bad.status(400)) as server:
        scores = ask(server, key_env="REWARD_KEY")
        assert server.seen[0][2]["Authorization"] == "Bearer hidden-1234"
        assert "hidden" not in "".join(scores.errors)
        with pytest.raises(UserError, match="NO_SUCH_KEY is empty"):
            base.build("remote", url=server.url, key_env="NO_SUCH_KEY")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://a", "http://", "http://a:b", "http://u:p@a", "http://a?b=1"]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="want http://HOST:PORT"):
        base.build("remote", url=url)


@pytest.mark.parametrize(
    "health, options, says",
    [
        ({"ok": False}, {}, "want ok"),
        (["ok"], {}, "want ok"),
        ({"ok": True, "rewards": ["a", "b"]}, {}, "serves a, b; set reward"),
        ({"ok": True, "rewards": ["sharp"]}, {"reward": "sharpp"}, 'try "sharp"'),
    ],
)
def test_a_server_that_does_not_serve_what_is_wanted_is_one_line(health, options, says):
    with (
        Scripted(health=lambda handler: bad.send(handler, health)) as server,
        pytest.raises(UserError, match=says),
    ):
        base.build("remote", url=server.url, **options)


def test_a_server_that_is_not_ready_yet_is_greeted_again():
    def late(handler):
        bad.healthy(handler) if server.greeted > 2 else bad.send(handler, b"loading", 503)

    with Scripted(health=late) as server:
        assert np.isfinite(ask(server).value).all() and server.greeted == 3


def test_a_date_says_when_to_come_back():
    from email.utils import formatdate

    assert 25 < wire.pause_of(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert wire.pause_of("7") == 7 and wire.pause_of("soon") == 0 and wire.pause_of(None) == 0


def test_pauses_grow_to_a_limit_and_differ(monkeypatch):
    monkeypatch.setattr(wire, "FIRST_PAUSE", 0.5)
    for attempts, most in ((1, 0.5), (2, 1.0), (3, 2.0), (20, wire.LONGEST_PAUSE)):
        drawn = {wire.pause_after(attempts) for _ in range(20)}
        assert len(drawn) > 1 and all(most / 2 <= pause <= most for pause in drawn)


def test_two_servers_are_one_mixture_and_each_is_logged():
    with Scripted() as left, Scripted(bad.answers(lambda r: {"scores": bad.rows(r, 2.0)})) as right:
        mixed = mixture.mixture(
            {
                "left": {"kind": "remote", "url": left.url, "weight": 2.0},
                "right": {"kind": "remote", "url": right.url, "weight": -0.5, "timeout": 1.0},
                "compressibility": 1.0,
            },
            LIMITS,
        )
        scores = mixed.host(IMAGES, PROMPTS, IDS)
        np.testing.assert_allclose(scores.value, 0.0)
        assert scores.parts["left"].tolist() == [0.5] * 4 and scores.parts["right"].tolist() == [2.0] * 4


# ---- GenEval and OCR: the same wire, another reading


def test_geneval_takes_the_graded_score_or_the_strict_one_and_logs_both():
    def graded(request):
        assert [item["metadata"]["include"] for item in request["items"]] == [[{"class": "dog"}]] * 4
        return {"scores": [row | {"parts": {"strict": 0}} for row in bad.rows(request, 0.75)]}

    prompts = [Prompt("a dog", {"include": [{"class": "dog"}]})] * 4
    with Scripted(bad.answers(graded)) as server:
        for strict, value in ((False, 0.75), (True, 0.0)):
            reward = base.build("geneval", url=server.url, limits=LIMITS, strict=strict)
            reward.prepare(prompts)
            scores = reward.host(IMAGES, prompts, IDS)
            assert scores.value.tolist() == [value] * 4
            assert (
                scores.parts["graded"].tolist() == [0.75] * 4 and scores.parts["strict"].tolist() == [0] * 4
            )
        with pytest.raises(UserError, match='prompt "a cat" has no metadata "include"'):
            reward.prepare(["a cat"])


@pytest.mark.parametrize(
    "read, wanted, score",
    [
        ("OPEN  daily", "Open", 1.0),
        ("opem", "open", 0.75),
        ("", "open", 0.0),
        ("something else entirely", "open", 0.0),
        ("G R A N D", "grand", 1.0),
    ],
)
def test_text_is_compared_as_flow_grpo_does(read, wanted, score):
    from smart_grpo_jax.rewards import ocr

    assert ocr.similarity(read, wanted) == score


def test_ocr_compares_what_the_server_read_with_what_the_prompt_says():
    texts = ["Open", "opem", None, "zzz"]

    def read(request):
        both = zip(bad.rows(request), texts, strict=True)
        return {"scores": [row | {"score": None, "text": text} for row, text in both]}

    prompts = ['a sign that says "open"'] * 3 + [Prompt("a sign", {"text": "zz z"})]
    with Scripted(bad.answers(read)) as server:
        reward = base.build("ocr", url=server.url, limits=LIMITS)
        reward.prepare(prompts)
        scores = reward.host(IMAGES, prompts, IDS)
        np.testing.assert_array_equal(scores.value, [1.0, 0.75, np.nan, 1.0])
        assert scores.errors[2] == "the answer has no text"
        with pytest.raises(UserError, match="asks for no text"):
            reward.prepare(["a dog"])


def test_a_picture_travels_as_png_without_loss():
    from smart_grpo_jax.rewards.server import picture

    np.testing.assert_array_equal(picture(remote.png(IMAGES[0]), 64), IMAGES[0])
    assert json.dumps(remote.png(IMAGES[0]))
