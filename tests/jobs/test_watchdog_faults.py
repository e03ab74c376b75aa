"""Whole runs of several processes, one of which is killed, stopped, put to sleep or told to end."""

import functools
import json
import re

import pytest
import tiny_run

from smart_grpo_jax.runtime.metrics import read

pytestmark = [pytest.mark.faults, pytest.mark.slow]

LENGTH = (
    "train.epochs=4", "eval.every=0", "eval.prompts=4", "checkpoint.every=2", "train.check_rewards=false",
    "search.rounds=0",  # less to compile
)  # fmt: skip
CLOCKS = ("log.silence=6", "log.lag=8")
SECONDS = 20
"""From the fault to the end of the last survivor."""

SAYS = {"kill": "died", "stop": "has been silent for", "sleep": "has kept the others waiting"}
FAULTS = [
    # the first step at which nothing compiles any more is 2; a checkpoint of epoch 2 is begun there
    (2, 0, "kill", "rollout", 3), (2, 0, "stop", "update", 3), (2, 0, "sleep", "save", 4),
    (2, 1, "kill", "update", 3), (2, 1, "stop", "save", 4), (2, 1, "sleep", "rollout", 3),
    (4, 0, "kill", "update", 3), (4, 2, "stop", "rollout", 3), (4, 3, "sleep", "update", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of so many processes, which also fills the compile cache: lines and state."""
    base = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(processes):
        folder = base / str(processes)
        done = tiny_run.launch(folder, processes, *LENGTH)
        assert done.returncode == 0, done.stderr[-3000:]
        return tiny_run.timeless(folder), tiny_run.state_hash(folder)

    return run


def struck(folder, processes, rank, action, phase, step):
    """The run with its fault, and the seconds from the fault to the end of the launcher's survivors."""
    once = folder.parent / "fault"
    fault = {"rank": rank, "phase": phase, "step": step, "action": action, "once": str(once)}
    done = tiny_run.launch(
        folder,
        processes,
        *LENGTH,
        *CLOCKS,
        module="process_with_fault",
        grace=12,
        SGRPO_TEST_FAULT=json.dumps(fault),
    )
    return done, json.loads(once.read_text())["time"]


def said(done):
    """The lines of stderr by rank, the launcher's own left out."""
    lines = [re.fullmatch(r"\[(\d+)\] (.*)", line) for line in done.stderr.splitlines()]
    return [(int(line[1]), line[2]) for line in lines if line is not None]


@pytest.mark.parametrize("processes, rank, action, phase, step", FAULTS)
def test_survivors_name_the_culprit_and_the_restart_ends_as_if_nothing_had_been(
    whole, tmp_path, processes, rank, action, phase, step
):
    want_lines, want_state = whole(processes)
    folder = tmp_path / "run"
    done, struck_at = struck(folder, processes, rank, action, phase, step)
    assert done.returncode == 75, done.stderr[-3000:]
    survivors = [other for other in range(processes) if other != rank]
    told = said(done)
    for other in survivors:
        (line,) = [text for who, text in told if who == other]
        assert line.startswith(f"process {rank} (") and SAYS[action] in line, line
        assert f"in phase {phase} of step {step}" in line, line
        code, ended_at = json.loads((tmp_path / f"end-{other}").read_text())
        assert code == 75 and ended_at - struck_at <= SECONDS, ended_at - struck_at
    again, _ = struck(folder, processes, rank, action, phase, step)
    assert again.returncode == 0, again.stderr[-3000:]
    assert tiny_run.state_hash(folder) == want_state
    assert tiny_run.timeless(folder) == want_lines


@pytest.mark.parametrize(
    "processes, rank, phase, step, saved", [(2, 1, "rollout", 3, 3), (4, 0, "update", 3, 4)]
)
def test_a_signal_to_one_process_saves_everywhere_and_asks_for_a_restart(
    whole, tmp_path, processes, rank, phase, step, saved
):
    want_lines, want_state = whole(processes)
    folder = tmp_path / "run"
    done, _ = struck(folder, processes, rank, "term", phase, step)
    assert done.returncode == 75, done.stderr[-3000:]
    assert tiny_run.epochs(folder)[-1] == saved
    line = f"stopped by SIGTERM (process {rank}) after epoch {saved}; the same command goes on from there"
    assert sorted(who for who, text in said(done) if text == line) == list(range(processes))
    assert [row["epoch"] for row in read(folder)][-1] <= saved
    again, _ = struck(folder, processes, rank, "term", phase, step)
    assert again.returncode == 0 and f"resumed after epoch {saved}" in again.stdout, again.stderr[-3000:]
    assert tiny_run.state_hash(folder) == want_state
    assert tiny_run.timeless(folder) == want_lines
    assert not list(folder.glob("metrics.lost-*"))
