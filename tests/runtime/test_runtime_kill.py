"""kill -9 at random moments, the same command again, and the end is the same to the bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_loop
import pytest

from smart_grpo_jax.runtime.metrics import read

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EPOCHS = 60


@pytest.fixture
def server(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        # jax warns about forks; here nothing of it has started before the fork
        [sys.executable, "-W", "ignore", str(HERE / "kill_loop.py")],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(tmp_path / "stderr.txt", "w"),
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=300)


def start(server, folder):
    """Starts the loop; returns the epoch it resumes from and its pid."""
    server.stdin.write(f"{folder} {EPOCHS}\n")
    server.stdin.flush()
    word, epoch, pid = server.stdout.readline().split()
    assert word == "from"
    return int(epoch), int(pid)


def wait_for_lines(folder, count):
    """Progress, not the clock, says when: the machine may be busy."""
    path = folder / "metrics.jsonl"
    end = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, "the loop makes no progress"
        time.sleep(0.001)


@pytest.mark.faults
def test_five_kills_do_not_change_a_bit(tmp_path, server):
    kill_loop.run(tmp_path / "whole", EPOCHS)
    want = (tmp_path / "whole" / "final.txt").read_text()
    lines = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    folder = tmp_path / "killed"
    clock = random.Random(20251002)
    resumed = []
    for _ in range(5):
        epoch, pid = start(server, folder)
        resumed.append(epoch)
        wait_for_lines(folder, epoch + clock.randint(3, 9))
        time.sleep(clock.uniform(0, 0.05))  # anywhere between two steps of a save
        os.kill(pid, signal.SIGKILL)
        assert server.stdout.readline() == f"ended {-signal.SIGKILL}\n"
    last, _ = start(server, folder)
    assert server.stdout.readline() == "ended 0\n", (tmp_path / "stderr.txt").read_text()
    assert resumed == sorted(resumed) and 5 <= last < EPOCHS
    assert (tmp_path / "stderr.txt").read_text() == ""  # no warning: a kill damages nothing
    assert (folder / "final.txt").read_text() == want
    assert (folder / "metrics.jsonl").read_bytes() == lines
    assert [row["epoch"] for row in read(folder)] == list(range(1, EPOCHS + 1))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [str(EPOCHS - 2), str(EPOCHS)]
    assert len((folder / "command.txt").read_text().splitlines()) == 6
