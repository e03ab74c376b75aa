"""The server of the package: what it answers to good requests, and to all others."""

import http.client
import json
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from smart_grpo_jax import RewardServer
from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Prompt
from smart_grpo_jax.rewards import base, remote, server

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
IMAGES[1] = 255
PROMPTS = [Prompt("a", {"n": 1}), Prompt("b"), Prompt("c", {"n": 3})]
IDS = ["x", "y", "z"]
LARGE = remote.png(np.zeros((20, 20, 3), np.uint8))


class Sharp(RewardServer):
    """Ten lines of a user."""

    name = "sharp"
    most_bytes, most_items, most_pixels = 20_000, 4, 100

    def __init__(self):
        self.calls = []

    def score(self, images, prompts, metadata):
        self.calls.append((images.shape, list(prompts), list(metadata)))
        if any(image.min() == 255 for image in images):
            raise ValueError("a white image")
        return [float(image.std()) for image in images]


@pytest.fixture
def sharp():
    made = Sharp()
    with made.start() as running:
        yield made, running


def post(running, body, path="/score", method="POST", headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=5)
    body = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def request(count=3, **changes):
    items = [
        {"id": IDS[i], "image": remote.png(IMAGES[i]), "prompt": str(PROMPTS[i]), "metadata": {}}
        for i in range(count)
    ]
    return {"id": "r1", "reward": "sharp", "items": items} | changes


def test_the_client_gets_what_the_function_said_and_one_bad_image_costs_one_score(sharp):
    made, running = sharp
    reward = base.build("remote", url=running.url, limits=Host(timeout=5.0))
    scores = reward.host(IMAGES, PROMPTS, IDS)
    np.testing.assert_allclose(scores.value, [IMAGES[0].std(), np.nan, IMAGES[2].std()], rtol=1e-6)
    assert scores.errors == ("", "the server says: ValueError: a white image", "")
    assert made.calls[0] == ((3, 8, 8, 3), ["a", "b", "c"], [{"n": 1}, {}, {"n": 3}])
    assert [shape for shape, *_ in made.calls[1:]] == [(1, 8, 8, 3)] * 3


def test_health_says_what_is_served(sharp):
    assert post(sharp[1], None, "/health", "GET") == (
        200,
        {"ok": True, "name": "sharp", "rewards": ["sharp"]},
    )


def test_the_same_request_id_is_scored_once_even_at_the_same_time():
    class Slow(Sharp):
        def score(self, images, prompts, metadata):
            time.sleep(0.1)
            return super().score(images, prompts, metadata)

    made, replies = Slow(), []
    with made.start() as running:
        ask = lambda: replies.append(post(running, request(1)))
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made.calls) == 1 and replies[0] == replies[1] == replies[2]
        post(running, request(1, id="r2"))
        assert len(made.calls) == 2


@pytest.mark.parametrize(
    "body, status, says",
    [
        (b"{", 400, "no JSON"),
        (b"[" * 10_000, 400, "no JSON"),
        ([], 400, "want {"),
        ({}, 400, "want {"),
        (request(items=[]), 400, "want {"),
        (request(items=["a"]), 400, "want {"),
        (request(items=request()["items"] * 2), 400, "got 6 items, want at most 4"),
        (request(items=request(1)["items"] * 2), 400, "an id of its own"),
        (request(items=[{"image": remote.png(IMAGES[0])}]), 400, "an id of its own"),
        (request(reward="shrap"), 400, 'try "sharp"'),
        (request(items=[{"id": 1, "image": "!!"}]), 400, "PNG file in base64"),
        (request(items=[{"id": 1, "image": 7}]), 400, "PNG file in base64"),
        (request(items=[{"id": 1, "image": remote.png(IMAGES[0])[:60]}]), 400, "PNG file in base64"),
        (request(items=[{"id": 1, "image": "R0lGODlhAQABAAAAACw="}]), 400, "PNG file in base64"),
        (request(items=[{"id": 1, "image": LARGE}]), 400, "20 x 20 pixels"),
        (
            request(items=[*request(1)["items"], {"id": 1, "image": remote.png(IMAGES[1][:4])}]),
            400, "images of one size",
        ),
        (request(items=[request(1)["items"][0] | {"metadata": [1]}]), 400, "an object as metadata"),
        (b" " * 30_000, 413, "at most 20,000 bytes"),
    ],
)  # fmt: skip
def test_a_bad_request_gets_a_line_and_not_a_score(sharp, body, status, says):
    found, answer = post(sharp[1], body)
    assert found == status and says in answer["error"] and not sharp[0].calls


def test_other_paths_and_bodies_without_a_length_get_a_line(sharp):
    running = sharp[1]
    assert post(running, None, "/", "GET")[0] == 404 and post(running, request(), "/scores")[0] == 404
    assert post(running, None, headers={"Content-Length": "-1"})[0] == 411
    assert post(running, request(1))[0] == 200  # and it is still there


@pytest.mark.parametrize(
    "value, row",
    [
        (0.5, {"score": 0.5}),
        (np.float32(2), {"score": 2.0}),
        (None, {"score": None}),
        ("OPEN", {"score": None, "text": "OPEN"}),
        (float("nan"), {"score": None, "error": "got score nan"}),
        ({"score": 1, "parts": {"a": 2, "b": float("inf")}}, {"score": 1.0, "parts": {"a": 2.0}}),
        ({"score": None, "error": "no face"}, {"score": None, "parts": {}, "error": "no face"}),
    ],
)
def test_what_a_function_says_becomes_json(value, row):
    assert server.row(value) == row
    json.dumps(server.row(value), allow_nan=False)


def test_a_wrong_count_is_an_error_of_each_image():
    class Short(Sharp):
        def score(self, images, prompts, metadata):
            return []

    with Short().start() as running:
        rows = post(running, request(2))[1]["scores"]
        assert [row["error"] for row in rows] == ["ValueError: 0 scores for 1 images"] * 2


def test_a_reward_of_the_package_is_served_by_its_name():
    with server.NamedRewards(["compressibility", "jpeg_compressibility"]).start() as running:
        with pytest.raises(UserError, match="serves compressibility, jpeg_compressibility; set reward"):
            base.build("remote", url=running.url)
        for name in ("compressibility", "jpeg_compressibility"):
            there = base.build("remote", url=running.url, reward=name, limits=Host(timeout=30.0))
            here = base.load_reward(name)(IMAGES.astype(np.float32) / 255, PROMPTS)
            np.testing.assert_allclose(there.host(IMAGES, PROMPTS, IDS).value, here, rtol=1e-6)


def test_the_command_line_serves_a_users_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from smart_grpo_jax import host_reward

        @host_reward
        def read(images, prompts, metadata):
            return [{"score": 0.25, "parts": {"n": m.get("n", 0)}} for m in metadata]
        """)
    )
    command = [sys.executable, "-m", "smart_grpo_jax.rewards.server", "--reward", "mine:read", "--port=0"]
    root = server.__file__.rpartition("smart_grpo_jax")[0]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": root, "PATH": ""}
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving mine:read on http://127.0.0.1:")
        reward = base.build("remote", url=line.split()[-1], parts="n", limits=Host(timeout=5.0))
        scores = reward.host(IMAGES, PROMPTS, IDS)
        assert scores.value.tolist() == [0.25] * 3 and scores.parts["n"].tolist() == [1, 0, 3]
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "usage"),
        (["--port", "1"], "usage"),
        (["--reward"], "usage"),
        (["--rewards", "a"], "usage"),
        (["--reward", "shapse"], 'try "shapes"'),
        (["--reward", "nothing_here:f"], "no module nothing_here"),
        (["--reward", "compressibility", "--port", "99999"], "cannot listen"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(argv, says, capsys):
    assert server.main(argv) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
