"""Rewards of the user's own in whole runs: the files and commands of docs/your_rewards.md, and failures."""

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import RewardError, UserError
from smart_grpo_jax.jobs import check, host_scores
from smart_grpo_jax.policy import credit
from smart_grpo_jax.policy.rollout import Acted
from smart_grpo_jax.rewards import base
from smart_grpo_jax.rewards.server import RewardServer
from smart_grpo_jax.runtime.metrics import read

PAGE = (tiny_run.ROOT / "docs" / "your_rewards.md").read_text()
SHORT = ("train.epochs=2", "eval.prompts=4", "eval.every=0", "memory.rollout=2", "checkpoint.every=1")
NAMES = re.compile(r"```python\n# (\w+\.py)\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The files of the docs page in the working directory, and its commands as lists of words."""
    for name, text in NAMES.findall(PAGE):
        (tmp_path / name).write_text(f"# {name}\n{text}")
    monkeypatch.chdir(tmp_path)
    yield [shlex.split(block.replace("\\\n", " ")) for block in COMMANDS.findall(PAGE)]
    sys.modules.pop("my_rewards", None)


def asked(commands, word):
    """The overrides of the page's training command that says `word`."""
    words = next(c for c in commands if "--config=configs/shapes.py" in c and any(word in w for w in c))
    return [w.removeprefix("--config.") for w in words if w.startswith("--config.")]


def trained(folder, *overrides):
    return tiny_run.run(folder, *SHORT, *overrides)


# ---- the page, as it stands


@pytest.mark.slow
@pytest.mark.parametrize(
    "word, name, weight",
    [("my_rewards:redness=", "my_rewards:redness", 1.0), ("my_rewards:sharp=", "my_rewards:sharp", 0.05)],
)
def test_a_function_of_the_page_trains_from_the_command_line(page, tmp_path, word, name, weight):
    assert trained(tmp_path / "run", *asked(page, word)) == 0
    rows = read(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["train/failed"] == 0 and row["update/grad_norm"] > 0
        np.testing.assert_allclose(row["train/reward"], weight * row[f"train/{name}"], rtol=1e-4)
    assert np.isfinite(rows[0][f"eval/{name}"])


def test_every_training_command_of_the_page_names_rewards_that_can_be_built(page):
    commands = [c for c in page if "--config=configs/shapes.py" in c]
    assert len(commands) == 5
    for words in commands:
        values = configs.default()
        for word in words:
            if word.startswith("--config."):
                configs.override(values, *word.removeprefix("--config.").split("=", 1))
        check.check(configs.from_dict(values))


@pytest.mark.slow
def test_the_server_of_the_page_trains_from_the_command_line_and_its_death_ends_the_run(
    page, tmp_path, capfd
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    file = tmp_path / "my_server.py"
    file.write_text(file.read_text().replace("8001", port))
    words = next(c for c in page if c[-1] == "my_server.py")
    overrides = [w.replace("8001", port) for w in asked(page, "sharp.kind=remote")]
    impatient = ["rewards.sharp.retries=0", "host.timeout=5"]
    server = subprocess.Popen(
        [sys.executable, *words[1:]], stdout=subprocess.PIPE, text=True, env=tiny_run.environment()
    )
    try:
        assert server.stdout.readline() == f"serving sharp on http://127.0.0.1:{port}\n"
        assert trained(tmp_path / "run", *overrides) == 0
    finally:
        server.terminate()
        server.wait(10)
    assert all(row["train/failed"] == 0 and row["train/sharp"] > 0 for row in read(tmp_path / "run")[1:])
    capfd.readouterr()
    assert trained(tmp_path / "run", *overrides, *impatient, "train.epochs=3") == 2
    assert f"no server answers at http://127.0.0.1:{port}/health" in capfd.readouterr().err


@pytest.mark.slow
def test_a_server_that_dies_in_a_run_ends_it_with_the_first_sample_and_the_run_goes_on_later(tmp_path, capfd):
    class Fickle(RewardServer):
        name, calls, dead = "fickle", 0, True

        def score(self, images, prompts, metadata):
            self.calls += 1
            if self.dead and self.calls > 3:  # the evaluation's four images, and the first epoch's sixteen
                raise ConnectionError("out of memory")
            return [float(image.mean()) for image in images]

    server = Fickle()
    with server.start() as running:
        remote = [
            "rewards.shapes=0", "rewards.f.kind=remote", f"rewards.f.url={running.url}", "rewards.f.weight=1",
            "search_reward.shapes=1",
        ]  # fmt: skip
        assert trained(tmp_path / "run", *remote) == 5
        error = capfd.readouterr().err
        assert re.match(
            r"rewards: 100% of epoch 2 failed: e2/p\d+/m0: f: the server says: ConnectionError", error
        )
        assert error.count("\n") == 1 and tiny_run.epochs(tmp_path / "run") == [0, 1]
        server.dead = False
        assert trained(tmp_path / "run", *remote) == 0
    assert [row["epoch"] for row in read(tmp_path / "run")] == [0, 1, 2]


# ---- the seam between graph and host


def fake(host):
    return base.Reward("fake", {}, base.no_prompt, base.nothing().score, uses_prompt=False, host=host)


def judged(values, errors, **parts):
    parts = {name: np.asarray(value, np.float32) for name, value in parts.items()}
    return base.HostScores(np.asarray(values, np.float32), tuple(errors), parts)


def config(**tables):
    values = configs.default()
    for name, table in tables.items():
        values[name] = table
    return configs.from_dict(values)


def test_images_of_one_call_are_scored_while_the_next_call_runs():
    running, seen = threading.Event(), []

    def host(images, prompts, ids):
        assert running.wait(5)  # set by what comes after the second submission, before the scores are wanted
        seen.append((images.shape, list(prompts), list(ids)))
        return judged([float(len(ids))] * len(ids), [""] * len(ids))

    outside = host_scores.Finished(fake(host), config(), "e3", 2)
    outside.submit(jnp.ones((6, 2, 2, 3)), ["a", "b"], [7, 9])  # one group of the call is padding
    outside.submit(jnp.zeros((6, 2, 2, 3)), ["c", "d", "e"], [1, 2, 3])
    running.set()
    first, second = outside.gather()
    assert first.value.tolist() == [4.0] * 4 and second.value.tolist() == [6.0] * 6
    assert ((4, 2, 2, 3), ["a", "a", "b", "b"], ["e3/p7/m0", "e3/p7/m1", "e3/p9/m0", "e3/p9/m1"]) in seen


def test_a_reward_in_the_graph_alone_fetches_nothing():
    outside = host_scores.Finished(base.nothing(), config(), "e1", 1)
    outside.submit(None, ["a"], [0])  # type: ignore[arg-type]
    assert outside.gather() == [] and outside.failed == ()


def test_an_image_that_is_no_number_has_no_score():
    images = jnp.ones((2, 2, 2, 3)).at[1, 0, 0, 0].set(jnp.nan)
    host = lambda images, prompts, ids: judged([1.0, 2.0], ["", ""])
    outside = host_scores.Finished(fake(host), config(), "e1", 1)
    outside.submit(images, ["a", "b"], [4, 5])
    np.testing.assert_array_equal(outside.gather()[0].value, [1.0, np.nan])
    assert outside.failed == ("e1/p5/m0: the image is not finite",)


def test_pixels_round_half_to_even_and_clamp_on_the_device_as_on_the_host():
    levels = np.array([-1, 0.5 / 255, 1.5 / 255, 2.5 / 255, 0.5, 2, np.nan, np.inf], np.float32)
    images = np.broadcast_to(levels[:, None, None, None], (8, 1, 1, 3))
    found, finite = host_scores.pixels(jnp.asarray(images))
    np.testing.assert_array_equal(found, base.eight_bit(images))
    assert finite.tolist() == [True] * 6 + [False] * 2


def test_the_hosts_share_is_added_and_what_is_missing_stays_missing():
    blank = jnp.zeros(())
    acted = Acted(
        blank, blank, blank, blank, blank, blank, jnp.array([1.0, jnp.nan, 3.0, 4.0, 5.0]),
        jnp.array([True, False, True, True, True]), {"graph": jnp.arange(5.0)}, None, None,
    )  # fmt: skip
    scores = judged([10, 20, np.nan, 40], ["", "", "gone", ""], mine=[1, 2, np.nan, 4])
    found = host_scores.added(acted, scores)
    np.testing.assert_array_equal(found.reward, [11, np.nan, np.nan, 44, np.nan])
    assert found.ok.tolist() == [True, False, False, True, False] and found.reward.dtype == jnp.float32
    assert set(found.parts) == {"graph", "mine"} and found.parts["mine"].shape == (5,)


def test_failures_are_told_by_sample_and_too_many_of_them_end_the_run():
    scored = [judged([1.0, np.nan], ["x: late", "y: gone"]), judged([1.0, 1.0], ["", ""])]
    failed = host_scores.failures(scored, [["a", "b"], ["c", "d"]])
    assert failed == ["b: y: gone", "a: x: late"]  # first what costs a reward
    say = host_scores.tolerated(config(), 0.25, "epoch 3", failed)
    assert say == "WARNING: 2 images of epoch 3 lack a score: b: y: gone (also a)"
    assert host_scores.tolerated(config(), 0.0, "epoch 3", []) == ""
    with pytest.raises(RewardError, match="50% of epoch 3 failed: b: y: gone"):
        host_scores.tolerated(config(), 0.5, "epoch 3", failed)
    strict = config(host={"failed_share": 0.1})
    with pytest.raises(RewardError, match="20% of epoch 1 failed, or are NaN"):
        host_scores.tolerated(strict, 0.2, "epoch 1", [])


def test_a_logged_part_is_averaged_where_it_is_known():
    values, ok = jnp.array([1.0, jnp.nan, 3.0, 100.0]), jnp.array([True, True, True, False])
    assert credit._known_mean(values, ok) == 2.0
    assert jnp.isnan(credit._known_mean(values, jnp.array([False, True, False, False])))


@pytest.mark.slow
def test_pictures_are_drawn_where_the_server_is_gone_and_scored_where_it_is_there(tmp_path, capfd):
    class Half(RewardServer):
        name = "half"

        def score(self, images, prompts, metadata):
            return [0.5] * len(images)

    with Half().start() as running:
        remote = [
            "rewards.shapes=0",
            "rewards.f.kind=remote",
            f"rewards.f.url={running.url}",
            "search.rounds=0",
        ]
        flags = ["--prompts=a photo of a cross|a photo of a red circle"]
        assert tiny_run.run(tmp_path / "a", *remote, mode="sample", flags=flags) == 0
        assert re.search(r"base +plain +0\.500", capfd.readouterr().out)
    assert tiny_run.run(tmp_path / "b", *remote, mode="sample", flags=flags) == 0
    assert "pictures are not scored: f: reward remote: no server answers" in capfd.readouterr().out
    for run in ("a", "b"):
        assert len(list((tmp_path / run / "sampled").glob("0*.png"))) == 2


# ---- what cannot be is one line at the door


HOST = {"shapes": 1.0, "jpeg_compressibility": 1.0}


@pytest.mark.parametrize(
    "tables, says",
    [
        ({"rewards": HOST}, "search_reward: got nothing, so the search would ask jpeg_compressibility"),
        ({"search_reward": {"jpeg_compressibility": 1.0}}, "search_reward: got jpeg_compressibility"),
        (
            {"rewards": HOST, "search_reward": {"shapes": 1.0}, "search": {"credit": "local"}},
            "search.credit: got local",
        ),
        ({"rewards": HOST, "search": {"credit": "difference", "rounds": 0}}, "search.credit: got difference"),
        ({"rewards": {"a": {"kind": "no_module_here:f"}}}, "no module no_module_here"),
        ({"eval_rewards": {"a": {"kind": "shapse"}}}, 'eval_rewards.a: got "shapse"'),
    ],
)
def test_a_host_reward_where_none_can_be_is_refused_with_what_to_set(tables, says):
    with pytest.raises(UserError) as caught:
        check.check(config(**tables))
    assert says in caught.value.line and "\n" not in caught.value.line


@pytest.mark.parametrize(
    "tables",
    [
        {"rewards": HOST, "search_reward": {"shapes": 1.0}},
        {"rewards": HOST, "search": {"rounds": 0}},
        {"rewards": HOST, "search_reward": {"shapes": 1.0}, "search": {"credit": "offset"}},
        {"eval_rewards": HOST},
    ],
)
def test_a_host_reward_where_finished_images_are_judged_is_welcome(tables):
    check.check(config(**tables))


def test_the_page_tells_every_option_and_its_json_is_json():
    for name in ("failed_share", "ahead", "timeout", "deadline", "retries"):
        assert f"host.{name}" in PAGE
    for kind in sorted(base.HOST):
        assert f"`{kind}`" in PAGE
    assert json.loads('{"ok": true, "name": "sharp", "rewards": ["sharp"]}')["ok"]
    assert '{"ok": true, "name": "sharp", "rewards": ["sharp"]}' in PAGE
    assert Path(tiny_run.ROOT / "configs" / "shapes.py").exists()
