import os
import shlex
import signal
import subprocess
import time

import pytest
from fake_commands import LAUNCH, Machine, refused

BUCKET = "gs://bucket/team/runs"


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, "gcsfuse", "sudo", "mountpoint", "mount.nfs", "uv", "hostname")


def test_the_bucket_is_mounted_once_and_without_stale_caches(machine):
    machine.answer((["mountpoint"], "", 1))
    assert machine.run("worker.sh", "mount", BUCKET=BUCKET).returncode == 0
    mounted = machine.calls()[-1]
    assert mounted[0] == "gcsfuse" and mounted[-2:] == ["bucket", "/mnt/runs"]
    caches = {"--metadata-cache-ttl-secs=0", "--metadata-cache-negative-ttl-secs=0"}
    assert caches | {"--only-dir=team/runs"} <= set(mounted)
    assert any(word.startswith("--rename-dir-limit=") for word in mounted)
    machine.log.unlink()
    machine.answer((["mountpoint"], "", 0))
    assert machine.run("worker.sh", "mount", BUCKET=BUCKET).returncode == 0
    assert [call[0] for call in machine.calls()] == ["mountpoint"]


def test_a_share_is_mounted_by_nfs(machine):
    machine.answer((["mountpoint"], "", 1))
    assert machine.run("worker.sh", "mount", "--nfs=10.0.0.2:/share", "--runs=/data").returncode == 0
    assert machine.calls()[-1] == ["sudo", "mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share", "/data"]


def test_a_mount_that_fails_starts_nothing(machine):
    machine.answer((["mountpoint"], "", 1), (["gcsfuse"], "", 5))
    done = machine.run("worker.sh", "run", "--", "--config=x", BUCKET=BUCKET)
    assert done.returncode == 5 and not (machine.home / "sgrpo-state").exists()


def test_install_brings_python_and_the_package_with_its_extra(machine):
    done = machine.run("worker.sh", "install", "--extra=cuda", "--dry-run")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[1] if "uv" in line[0] else line[0] for line in lines] == ["env", "venv", "pip"]
    assert lines[2][-1].endswith("[cuda]") and lines[2][-1] != "[cuda]"


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ([], {}, "no command"),
        (["mount"], {}, "BUCKET: is not set"),
        (["mount"], {"BUCKET": "x"}, "BUCKET: got x"),
        (["run"], {"BUCKET": BUCKET}, "nothing after --"),
        (["again"], {}, "nothing after --"),
        (["stop", "--grace=soon"], {}, "GRACE: got soon"),
    ],
)
def test_mistakes_are_one_line(machine, words, settings, says):
    assert says in refused(machine.run("worker.sh", *words, **settings))


@pytest.mark.parametrize(
    ("codes", "runs", "last"),
    [([0], 1, 0), ([2], 1, 2), ([75, 75, 0], 3, 0), ([75, 4], 2, 4), ([137, 0], 2, 0), ([75] * 9, 4, 75)],
    ids=["done", "a mistake", "asked twice", "then numerics", "killed", "too often"],
)
def test_only_75_and_signals_start_again(machine, codes, runs, last, tmp_path):
    count = tmp_path / "count"
    listed = " ".join(map(str, codes))
    program = (
        f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n+1)) >{count}; set -- {listed}; shift $n; exit $1"
    )
    done = machine.run("worker.sh", "again", "--restarts=3", "--pause=0", "--", "sh", "-c", program)
    assert (int(count.read_text()), done.returncode) == (runs, last)


def wait_until(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_program_knows_that_it_would_be_started_again(machine):
    done = machine.run("worker.sh", "again", "--", "sh", "-c", "echo supervised $SGRPO_SUPERVISED")
    assert "supervised 1" in done.stdout.splitlines()


def test_a_run_starts_once_stops_on_request_and_says_so(machine, tmp_path):
    python = machine.home / "sgrpo-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/words\n"
        f"trap 'touch {tmp_path}/saved; exit 75' TERM\nwhile :; do /bin/sleep 0.1; done\n"
    )
    python.chmod(0o755)
    words = ["--config=x", '--config.prompts.negative=it\'s "b" $HOME']
    assert machine.run("worker.sh", "status").stdout.endswith("not running\n")
    assert machine.run("worker.sh", "run", "--", *words, BUCKET=BUCKET).returncode == 0
    try:
        wait_until((tmp_path / "words").exists)
        assert (tmp_path / "words").read_text().splitlines() == ["-m", "smart_grpo_jax.main", *words]
        again = machine.run("worker.sh", "run", "--", *words, BUCKET=BUCKET)
        assert again.returncode == 3 and "already running" in again.stderr
        assert "running as process" in machine.run("worker.sh", "status").stdout
        assert machine.run("worker.sh", "stop", "--grace=20").stdout == "stopped\n"
        assert (tmp_path / "saved").exists()
        # 75 after `stop` is obeyed: nothing starts again.
        assert machine.run("worker.sh", "status").stdout.endswith("ended with exit code 75\n")
        assert machine.run("worker.sh", "stop").stdout == "not running\n"
    finally:
        pid = int((machine.home / "sgrpo-state" / "pid").read_text())
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pid = 0


def test_a_stop_during_the_pause_ends_the_loop(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    command = [
        "bash",
        str(LAUNCH / "worker.sh"),
        "again",
        f"--state={state}",
        "--pause=60",
        "--",
        "sh",
        "-c",
        "exit 75",
    ]
    loop = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert loop.stderr is not None and "starting again" in loop.stderr.readline()
    loop.send_signal(signal.SIGTERM)
    assert loop.wait(timeout=20) == 75 and (state / "exit").read_text() == "75\n"
