"""kill -9, SIGTERM, a second start, a damaged checkpoint: the end is the same to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

from smart_grpo_jax.runtime.metrics import read

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
EPOCHS = {2: 16, 10: 40}
"""How long a run must be to be killed so often."""
SHORT = ("train.epochs=6", "eval.every=3", "eval.prompts=4", "checkpoint.every=2")
PATIENCE = 300


class Server:
    """Forked processes, one at a time, that run the entry point as `python -m` would."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            # jax warns about forks; here nothing of it has started before the fork
            [sys.executable, "-W", "ignore", str(HERE / "run_server.py")],
            env=tiny_run.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, argv, log, stop=None):
        """Begin a process; returns its pid."""
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(log), "stop": stop}) + "\n")
        self.process.stdin.flush()
        word, pid = self.process.stdout.readline().split()
        assert word == "pid"
        return int(pid)

    def wait(self):
        """The exit code of the process that was started last; negative where a signal ended it."""
        word, code = self.process.stdout.readline().split()
        assert word == "ended"
        return int(code)

    def run(self, argv, log, stop=None):
        """Begin a process and wait for it."""
        self.start(argv, log, stop)
        return self.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=PATIENCE)


def whole_run(server, folder, overrides):
    """An undisturbed run: its lines, its final state, and how long an epoch took once all was compiled."""
    log = folder.with_suffix(".log")
    assert server.run(tiny_run.command(folder, *overrides), log) == 0, log.read_text()
    clock = [row["wall/train_seconds"] for row in read(folder)]
    pace = (clock[-1] - clock[2]) / (len(clock) - 3)
    return tiny_run.timeless(folder), tiny_run.state_hash(folder), pace


@pytest.fixture(scope="module")
def short(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "whole"
    return *whole_run(server, folder, SHORT), folder


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(condition, what):
    """Progress, not the clock, says when: the machine may be busy."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_do_not_change_a_bit(server, short, kills, tmp_path):  # `short` has filled the compile cache
    overrides = (f"train.epochs={EPOCHS[kills]}", "eval.every=5", "eval.prompts=4")
    want_lines, want_state, pace = whole_run(server, tmp_path / "whole", overrides)
    folder, log = tmp_path / "killed", tmp_path / "log.txt"
    argv = tiny_run.command(folder, *overrides)
    resumed = []
    for life in range(kills):
        clock = random.Random(life)
        done = tiny_run.epochs(folder)
        resumed.append(done[-1] if done else 0)
        pid = server.start(argv, log)
        goal = resumed[-1] + 1 + clock.randint(2, 4)  # lines: two epochs reach the next checkpoint
        wait_until(lambda: lines(folder) >= goal, log.read_text)  # noqa: B023
        time.sleep(clock.uniform(0, 2 * pace))  # anywhere: rollout, update, evaluation, save
        os.kill(pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL, log.read_text()
    # never backwards; and ten kills have fallen between several checkpoints
    assert resumed == sorted(resumed) and (kills == 2 or len(set(resumed)) >= 3)
    assert server.run(argv, log) == 0, log.read_text()
    assert tiny_run.timeless(folder) == want_lines
    assert tiny_run.state_hash(folder) == want_state
    told = log.read_text()
    assert "Traceback" not in told and "WARNING" not in told  # a kill damages nothing
    # a life that ends while it is loading leaves no line
    assert 2 <= len((folder / "command.txt").read_text().splitlines()) <= kills + 1
    assert not [p for p in (folder / "checkpoints").iterdir() if not p.name.isdigit()]


PHASES = {
    "loading": ["loading", 0],
    "first evaluation": ["evaluate", 0],
    "rollout": ["rollout", 2],
    "update": ["update", 3],
    "evaluation": ["evaluate", 3],
    "save": ["save", 4],
}


SLOW = ("loading", "first evaluation", "rollout", "update", "save")


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in PHASES]
)
def test_a_signal_saves_and_ends_and_the_same_command_goes_on(server, short, phase, tmp_path):
    want_lines, want_state, *_ = short
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    argv = tiny_run.command(folder, *SHORT)
    assert server.run(argv, log, PHASES[phase]) == 0, log.read_text()
    told, stopped_at = log.read_text(), tiny_run.epochs(folder)[-1]
    assert "SIGTERM: saving at the next safe point" in told and "Traceback" not in told
    assert f"stopped by SIGTERM after epoch {stopped_at};" in told
    # nothing that was computed is lost: a signal in epoch n + 1's update saves epoch n + 1
    assert stopped_at == {"update": 4}.get(phase, PHASES[phase][1])
    assert server.run(argv, log) == 0, log.read_text()
    assert f"resumed after epoch {stopped_at}" in log.read_text()
    assert tiny_run.timeless(folder) == want_lines
    assert tiny_run.state_hash(folder) == want_state
    assert not list(folder.glob("metrics.lost-*"))


@pytest.mark.slow
def test_the_second_start_on_a_folder_is_told_who_owns_it(server, short, tmp_path):
    want_lines, want_state, *_ = short
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    argv = tiny_run.command(folder, *SHORT)
    pid = server.start(argv, log)
    wait_until(lambda: (folder / "LOCK").exists() and (folder / "config.json").exists(), log.read_text)
    second = subprocess.run(
        [sys.executable, "-m", "smart_grpo_jax.main", *argv],
        env=tiny_run.environment(),
        capture_output=True,
        text=True,
    )
    assert (second.returncode, second.stdout) == (3, ""), second.stderr
    assert second.stderr.count("\n") == 1 and f"in use by pid {pid} " in second.stderr
    assert len(second.stderr) <= 200
    assert server.wait() == 0, log.read_text()
    assert tiny_run.timeless(folder) == want_lines and tiny_run.state_hash(folder) == want_state


def flip_a_byte(folder):
    """In the middle of the largest file of a checkpoint."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_costs_a_line_and_a_few_epochs(server, short, tmp_path):
    want_lines, want_state, _, whole = short
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    shutil.copytree(whole, folder)
    flip_a_byte(folder / "checkpoints" / "6")
    assert server.run(tiny_run.command(folder, *SHORT), log) == 0, log.read_text()
    warnings = [line for line in log.read_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 1 and "checkpoint 6 is damaged" in warnings[0]
    assert "resumed after epoch 4" in log.read_text()
    assert tiny_run.timeless(folder) == want_lines and tiny_run.state_hash(folder) == want_state
    assert (folder / "checkpoints" / "6.bad-1").is_dir()
    assert [row["epoch"] for row in read(folder / "metrics.lost-1.jsonl")] == [5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_afresh(server, short, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    shutil.copytree(short[-1], folder)
    for epoch in tiny_run.epochs(folder):
        flip_a_byte(folder / "checkpoints" / str(epoch))
    assert server.run(tiny_run.command(folder, *SHORT), log) == 6
    assert "every checkpoint is damaged" in log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()
