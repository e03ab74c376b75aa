"""Several processes on one machine, joined as the hosts of a pod are, do what one does.

Sums over images are taken in another order, so numbers agree within 1e-5 and not to the bit.
"""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_run

from smart_grpo_jax.jobs import host_scores
from smart_grpo_jax.rewards.base import HostScores
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.metrics import read

SHORT = (
    "train.epochs=4",
    "eval.every=0",
    "eval.prompts=4",
    "checkpoint.every=2",
    "train.check_rewards=false",
)
TOLERANCE = 1e-5


def python(code, *arguments):
    """A program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
    )


def rewards(folder):
    """The mean reward of every epoch, and those of the evaluations."""
    names = ("train/reward", "eval/reward")
    return {(row["epoch"], name): row[name] for row in read(folder) for name in names if name in row}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run with so many processes; 0 is one process without a launcher."""
    base = tmp_path_factory.mktemp("processes")

    @functools.cache
    def made(processes, devices):
        folder = base / f"{processes}x{devices}"
        if processes == 0:
            code = "import sys; from smart_grpo_jax import main; sys.exit(main.main(sys.argv[1:]))"
            done = python(code, *tiny_run.command(folder, *SHORT))
        else:
            done = tiny_run.launch(folder, processes, *SHORT, devices=devices)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder, done

    return lambda processes, devices=1: made(processes, devices)


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(2, 1), (4, 1), (2, 2)])
def test_the_rewards_of_every_epoch_are_those_of_one_process(runs, processes, devices):
    one, many = rewards(runs(0)[0]), rewards(runs(processes, devices)[0])
    assert one.keys() == many.keys() and len(one) == 4 + 2
    assert max(abs(one[key] - many[key]) for key in one) < TOLERANCE


@pytest.mark.slow
def test_one_process_speaks_and_writes(runs):
    folder, done = runs(2)
    assert {line[:3] for line in done.stdout.splitlines() if "Gloo" not in line} == {"[0]"}
    assert done.stderr == ""
    assert len((folder / "command.txt").read_text().splitlines()) == 1
    assert sorted(row["epoch"] for row in read(folder)) == [0, 1, 2, 3, 4]
    assert (folder / "report.html").exists() and (folder / "eval" / "4.npz").exists()


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_processes(runs, tmp_path):
    """Saved by two, gone on with by one, and the other way round: the restored state is the saved one."""
    more = tuple(word.replace("epochs=4", "epochs=5") for word in SHORT)
    for first, second in ((2, 0), (0, 2)):
        folder = tmp_path / f"{first}-{second}"
        folder.mkdir()
        subprocess.run(["cp", "-r", str(runs(first)[0]), str(folder / "run")], check=True)
        saved = tiny_run.state_hash(folder / "run")
        if second:
            done = tiny_run.launch(folder / "run", second, *more)
        else:
            code = "import sys; from smart_grpo_jax import main; sys.exit(main.main(sys.argv[1:]))"
            done = python(code, *tiny_run.command(folder / "run", *more))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "resumed after epoch 4" in done.stdout and "WARNING" not in done.stdout
        manifest = folder / "run" / "checkpoints" / "4" / "manifest.json"
        assert json.loads(manifest.read_text())["state_hash"] == saved
        assert tiny_run.epochs(folder / "run")[-1] == 5


JUDGE = """
import os
from smart_grpo_jax import host_reward

@host_reward
def brightness(images, prompts, metadata):
    with open(os.environ["SEEN"] + os.environ.get("SGRPO_PROCESS_ID", ""), "a") as file:
        file.write(f"{len(images)}\\n")
    return [float(image.mean()) / 255 for image in images]
"""


@pytest.mark.slow
def test_a_reward_of_the_users_own_is_asked_by_each_process_for_its_own_images(tmp_path):
    overrides = (
        *SHORT,
        "rewards.shapes=0",
        "rewards.my_judge:brightness=1",
        "search.rounds=0",
        "train.epochs=2",
    )
    folders = {}
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my_judge.py").write_text(JUDGE)
        folders[name] = tmp_path / name / "run"
        done = tiny_run.launch(folders[name], count, *overrides, SEEN=str(tmp_path / name / "seen"))
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = rewards(folders["one"]), rewards(folders["two"])
    assert one.keys() == two.keys() and max(abs(one[key] - two[key]) for key in one) < TOLERANCE
    counts = [
        sum(map(int, (tmp_path / name).read_text().split()))
        for name in ("one/seen0", "two/seen0", "two/seen1")
    ]
    assert counts[1] == counts[2] and counts[1] + counts[2] == counts[0]


def test_scores_of_several_processes_are_put_together_by_row(monkeypatch):
    """Two processes hold rows 0, 2 and 1; row 3 fills the mesh and is nobody's."""
    scores = lambda values, errors: HostScores(
        np.asarray(values, np.float32), errors, {"part": np.asarray(values, np.float32) * 2}
    )
    mine, other = scores([0.25, 0.75], ("", "late")), scores([0.5], ("",))
    told = []

    def gather(value):
        told.append(value)
        row = [[1], other.value.tolist(), list(other.errors), {"part": other.parts["part"].tolist()}]
        return [json.loads(json.dumps(value)), [row]]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    (found,) = host_scores.shared([mine], [np.asarray([0, 2])], [3])
    np.testing.assert_array_equal(found.value, np.asarray([0.25, 0.5, 0.75], np.float32))
    np.testing.assert_array_equal(found.parts["part"], found.value * 2)
    assert found.errors == ("", "", "late") and len(told) == 1
