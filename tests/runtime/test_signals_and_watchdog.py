import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smart_grpo_jax.runtime.signals import StopFlag
from smart_grpo_jax.runtime.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


def python(code, *arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_the_flag_and_the_old_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopFlag() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == signal.Signals(number).name
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert stop.requested == signal.Signals(number).name


STUCK = """
import jax, jax.numpy as jnp
from smart_grpo_jax.runtime.signals import StopFlag
with StopFlag():
    print("ready", flush=True)
    n = jnp.int32(0)
    # one XLA program that runs for minutes: Python's own handlers wait for its end
    jax.block_until_ready(jax.jit(lambda n: jax.lax.while_loop(lambda n: n >= 0, lambda n: n * 0 + 1, n))(n))
"""


def test_the_second_signal_ends_even_a_process_that_is_inside_a_program():
    process = python(STUCK)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("SIGTERM: saving at the next safe point")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75
    assert err.startswith("SIGTERM again: leaving at once")


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_phases_are_written_down(tmp_path):
    path = tmp_path / "phase.json"
    with Watchdog(tmp_path, "host-a", 0) as watchdog:
        with watchdog.phase("rollout", 7), watchdog.phase("reward", 7):
            wait_until(path.exists)
            row = json.loads(path.read_text())
    assert {k: row[k] for k in ("host", "phase", "step", "pid")} == {
        "host": "host-a",
        "phase": "reward",
        "step": 7,
        "pid": os.getpid(),
    }


ASLEEP = """
import sys, time
from smart_grpo_jax.runtime.watchdog import Watchdog
with Watchdog(sys.argv[1], "host-3", 2.0) as watchdog:
    for step in range(6):
        with watchdog.phase("rollout", step):
            time.sleep(0.4)  # 2.4 s in all, but no phase is too long
    time.sleep(2.2)  # between phases nothing is watched
    print("healthy", end="")  # not flushed
    with watchdog.phase("update", 6):
        with watchdog.phase("reward", 6):
            pass
        time.sleep(600)
"""


def test_an_overlong_phase_ends_the_process_with_one_line(tmp_path):
    process = python(ASLEEP, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75
    assert out == "healthy"
    assert len(err.splitlines()) == 1
    # not "2 s": on a busy machine the watch may come late
    assert re.match(r"host host-3: phase update of step 6 has taken \d+ s, more than 2 s; ending", err)
    assert json.loads((tmp_path / "phase.json").read_text())["phase"] == "update"
