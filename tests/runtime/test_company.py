"""Who is blamed when one of several processes dies, stops or sleeps, and how the others leave."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smart_grpo_jax.runtime.company import Beat, Limits, Seen, judge
from smart_grpo_jax.runtime.relay import Relay

ROOT = Path(__file__).parents[2]
LIMITS = Limits(silence=5.0, lag=8.0, deadline=30.0)


def seen(rank, position=7, phase="rollout", step=3, **known):
    beat = {name: known.pop(name) for name in ("age", "inside", "timed", "stretch") if name in known}
    return Seen(
        f"process {rank}", Beat(position, phase, step, **{"inside": True, "timed": True, **beat}), **known
    )


CASES = {
    "all is well": ([seen(0), seen(1), seen(2)], None),
    "a line broke": ([seen(0), seen(1, gone=True)], "process 1 died in phase rollout of step 3"),
    "a line broke between phases": ([seen(0), seen(1, gone=True, inside=False)], "process 1 died after"),
    "no word for too long": ([seen(0), seen(1, silent=6.0)], "process 1 has been silent for 6 s, last in"),
    "no word for a while": ([seen(0), seen(1, silent=4.0)], None),
    "one sleeps, two wait": (
        [seen(0, 9, age=20.0), seen(1, 8, age=20.0), seen(2, 9, age=20.0)],
        "process 1 has kept the others waiting in phase rollout of step 3 for 20 s",
    ),
    "one is slow, but goes on": ([seen(0, 9, age=20.0), seen(1, 8, age=2.0)], None),
    "one compiles": ([seen(0, 9, age=20.0), seen(1, 8, age=20.0, stretch=10.0)], None),
    "all are at one place": ([seen(0, age=20.0), seen(1, age=21.0)], None),
    "all are at one place for too long": (
        [seen(0, age=31.0), seen(1, age=40.0)],
        "all processes have been in phase rollout of step 3 for 31 s",
    ),
    "all load for long": ([seen(0, age=31.0, timed=False), seen(1, age=40.0, timed=False)], None),
    "one had a mistake": (
        [seen(0), seen(1, gone=True, left=(6, "disk: full"))],
        "process 1 ended with exit code 6: disk: full",
    ),
    "one is done": ([seen(0), seen(1, 3, gone=True, left=(0, ""))], None),
    "the dead go before the sleepers": ([seen(0, 5, age=90.0), seen(1, 6, gone=True)], "process 1 died"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_blame_falls_on(case):
    processes, says = CASES[case]
    verdict = judge(dict(enumerate(processes)), LIMITS)
    assert (verdict is None) == (says is None)
    if verdict is not None:
        assert verdict.line.startswith(says)
        assert verdict.code == (6 if "mistake" in case else 75)


def test_a_relay_carries_both_ways_and_keeps_quiet_about_the_end_of_the_other_side():
    server = socket.create_server(("127.0.0.1", 0))
    relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", patience=5.0)
    with socket.create_connection(relay.address.split(":"), timeout=10) as near:
        far, _ = server.accept()
        near.sendall(b"ask")
        assert far.recv(16) == b"ask"
        far.sendall(b"answer")
        assert near.recv(16) == b"answer"
        far.close()
        server.close()
        near.settimeout(0.5)
        with pytest.raises(TimeoutError):
            near.recv(16)


def test_a_relay_hangs_up_when_its_own_side_does():
    server = socket.create_server(("127.0.0.1", 0))
    relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", patience=5.0)
    near = socket.create_connection(relay.address.split(":"), timeout=10)
    far, _ = server.accept()
    near.close()
    far.settimeout(10)
    assert far.recv(16) == b""


WORKER = """
import os, signal, sys, time
from smart_grpo_jax.runtime import distributed
distributed.initialise()
from smart_grpo_jax.core.errors import StorageError
from smart_grpo_jax.runtime.watchdog import Watchdog
folder, victim, fault = sys.argv[1], int(sys.argv[2]), sys.argv[3]
me = int(os.environ["SGRPO_PROCESS_ID"])
def full():
    raise StorageError("disk: full")
FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "raise": lambda: 1 / 0,
    "mistake": full,
    "nothing": lambda: None,
}
with Watchdog(folder, me, 0, silence=3.0, lag=4.0) as watchdog:
    for step in range(5):
        with watchdog.phase("update", step):
            if (me, step) == (victim, 3):
                open(f"{folder}/fault", "w").close()
                FAULTS[fault]()
            distributed.gather(step)
print("done", me, flush=True)
"""


class Started:
    """Processes of WORKER without a launcher, which would end them by its own rules."""

    def __init__(self, folder, count, victim, fault):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "SGRPO_PROCESSES": str(count)}
        env |= {"SGRPO_COORDINATOR": f"127.0.0.1:{port}", "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(folder), str(victim), fault],
                env=env | {"SGRPO_PROCESS_ID": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def ends(self, ranks):
        """(exit code, lines of stderr, seconds since the fault) of these."""
        found = {}

        def wait(rank):
            _, err = self.processes[rank].communicate(timeout=240)
            since = time.time() - (self.folder / "fault").stat().st_mtime
            found[rank] = self.processes[rank].returncode, err.splitlines(), since

        threads = [threading.Thread(target=wait, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in ranks]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()


SAYS = {
    "kill": r"process {} \(host \S+, pid \d+\) died in phase update of step 3; ending",
    "stop": r"process {} \(host \S+, pid \d+\) has been silent for \d+ s, last in phase update of step 3;",
    "sleep": r"process {} \(host \S+, pid \d+\) has kept the others waiting in phase update of step 3 for \d",
}
QUICK = [("kill", 0, 2), ("sleep", 1, 2)]
SLOW = [("kill", 1, 2), ("stop", 0, 2), ("stop", 1, 2), ("sleep", 0, 2), ("kill", 3, 4), ("stop", 0, 4)]


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault, victim, count", [*QUICK, *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]]
)
def test_every_survivor_says_who_and_where_and_asks_to_be_restarted(tmp_path, fault, victim, count):
    with Started(tmp_path, count, victim, fault) as started:
        for code, err, seconds in started.ends([rank for rank in range(count) if rank != victim]):
            assert code == 75, err
            assert len(err) == 1 and re.match(SAYS[fault].format(victim), err[0]), err
            assert seconds <= 20
        if fault == "stop":  # continued, it finds itself abandoned
            started.processes[victim].send_signal(signal.SIGCONT)
        if fault != "kill":
            ((code, err, _),) = started.ends([victim])
            assert code == 75 and len(err) == 1 and f"process {victim} (" in err[0], err


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("fault, code", [("mistake", 6), ("raise", 1)])
def test_what_one_process_cannot_go_on_with_ends_all_with_its_code(tmp_path, fault, code):
    with Started(tmp_path, 2, 0, fault) as started:
        (first, mine, _), (second, other, _) = started.ends([0, 1])
    assert (first, second) == (code, code), (mine, other)
    what = {"mistake": "disk: full", "raise": "ZeroDivisionError: division by zero"}[fault]
    assert mine[-1] == what
    assert len(other) == 1 and other[0].endswith(f"ended with exit code {code}: {what}"), other


@pytest.mark.slow
def test_without_a_fault_all_leave_together(tmp_path):
    with Started(tmp_path, 3, 0, "nothing") as started:
        assert [code for code, _, _ in started.ends([0, 1, 2])] == [0, 0, 0]
