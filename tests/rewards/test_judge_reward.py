"""A vision-language model as a judge: what it is asked, and what counts as an answer."""

import numpy as np
import pytest
import scripted_server as bad
from scripted_server import Scripted

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards import base, judge, wire
from smart_grpo_jax.rewards.server import picture

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
PROMPTS = ['a {scale} of "fish"', "two dogs"]
LIMITS = Host(workers=2, timeout=0.5, deadline=2.0, retries=1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(wire, "FIRST_PAUSE", 0.01)


def chat(*texts):
    """A script that answers the n-th request with the n-th text."""
    reply = lambda text: {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return lambda handler, request, number: bad.send(handler, reply(texts[(number - 1) % len(texts)]))


def models(handler):
    bad.send(handler, {"data": [{"id": "eyes"}]} if handler.path == "/v1/models" else {"no": handler.path})


def asked(script, workers=1, **options):
    with Scripted(script, models) as server:
        limits = Host(workers=workers, timeout=0.5, deadline=2.0, retries=1)
        reward = base.build("judge", url=server.url + "/v1", model="eyes", limits=limits, **options)
        return reward.host(IMAGES, PROMPTS, ["a", "b"]), server


def test_a_judge_sees_one_picture_and_its_prompt_and_gives_a_grade(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    scores, server = asked(chat("Fine. Score: 4", "Score: **2.5**"), key_env="JUDGE_KEY")
    assert scores.value.tolist() == [np.float32(0.8), 0.5] and scores.errors == ("", "")
    for (path, request, headers), image, prompt in zip(server.seen, IMAGES, PROMPTS, strict=True):
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer s3cret"
        assert request["model"] == "eyes" and request["temperature"] == 0
        question, shown = request["messages"][0]["content"]
        assert prompt in question["text"] and "to 5 " in question["text"]
        kind, _, data = shown["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        np.testing.assert_array_equal(picture(data, 64), image)


@pytest.mark.parametrize(
    "text, value",
    [
        ("Score: 5", 1.0), ("score 0", 0.0), ("Score: 1 ... no, Score: 3", 0.6), ("SCORE", None), ("", None),
        ("It is good", None), ("Score: 7", None), ("Score: -1", None), ("5 of 5", None), ("Score = 2.", 0.4),
    ],
)  # fmt: skip
def test_only_a_number_on_the_scale_is_a_grade(text, value):
    answer = judge.grade(text, judge.compiled(judge.PATTERN), 5.0)
    assert answer.score == (None if value is None else pytest.approx(value)) and bool(answer.error) == (
        value is None
    )


def test_an_answer_without_a_number_is_missing_and_never_zero():
    scores, _ = asked(chat("Score: 1", "I cannot judge images."))
    np.testing.assert_array_equal(scores.value, [np.float32(0.2), np.nan])
    assert "no score in 'I cannot judge images.'" in scores.errors[1]


@pytest.mark.parametrize(
    "script, says",
    [
        (bad.answers(lambda r: {"choices": []}), "is no chat completion"),
        (bad.answers(lambda r: {"choices": [{"message": {"content": None}}]}), "is no chat completion"),
        (bad.answers(lambda r: b"busy"), "no JSON but 'busy' (2 attempts)"),
        (bad.status(401), "status 401"),
        (bad.hang, "no answer within 0.5 s"),
    ],
)
def test_a_judge_that_fails_costs_its_scores(script, says):
    scores, _ = asked(script, workers=2)
    assert np.isnan(scores.value).all() and says in scores.errors[0]


def test_own_words_pattern_and_scale():
    scores, server = asked(
        chat("<7>", "<10>"),
        template="{prompt}? up to {scale}",
        pattern=r"<(\d+)>",
        scale=10.0,
        max_tokens=9.0,
    )
    assert scores.value.tolist() == [np.float32(0.7), 1.0]
    assert server.seen[0][1]["messages"][0]["content"][0]["text"] == 'a {scale} of "fish"? up to 10'
    assert server.seen[0][1]["max_tokens"] == 9


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model": ""}, "want url, such as"),
        ({"pattern": "("}, "got pattern"),
        ({"pattern": r"\d"}, "want one group"),
        ({"scale": 0.0}, "got scale 0"),
        ({"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is empty"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(options, says):
    with Scripted(health=models) as server, pytest.raises(UserError, match=says):
        base.build("judge", **{"url": server.url + "/v1", "model": "eyes"} | options)


def test_a_judge_that_is_not_there_or_refuses_the_key_is_known_at_the_start():
    with pytest.raises(UserError, match="no model answers at"):
        base.build("judge", url=f"http://127.0.0.1:{bad.free_port()}/v1", model="eyes")
    with (
        Scripted(health=lambda handler: bad.send(handler, b"who?", 401)) as server,
        pytest.raises(UserError, match="status 401: who"),
    ):
        base.build("judge", url=server.url, model="eyes")
    with Scripted(health=lambda handler: bad.send(handler, b"", 404)) as server:
        assert base.build("judge", url=server.url, model="eyes").host is not None
