import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from fake_commands import LAUNCH, ROOT, refused

from smart_grpo_jax.runtime import distributed

CHILD = "import os, signal, sys, time\nrank = int(os.environ['SGRPO_PROCESS_ID'])\n"
COUNT = "--xla_force_host_platform_device_count"


@pytest.fixture
def launcher(tmp_path):
    """Runs launch/local.py on a tiny program in the place of smart_grpo_jax.main."""

    def command(program, *options):
        (tmp_path / "child.py").write_text(CHILD + program)
        own = [] if "--" in options else ["--"]
        return [sys.executable, str(LAUNCH / "local.py"), "--module=child", *options, *own]

    def start(program, *options, **settings):
        return subprocess.Popen(
            command(program, *options),
            env={**os.environ, "PYTHONPATH": str(tmp_path), **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def local(*words, **settings):
    return subprocess.run(
        [sys.executable, str(LAUNCH / "local.py"), *words],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines()


def wait_for(path, count):
    until = time.monotonic() + 30
    while len(list(path.glob("ready-*"))) < count:
        assert time.monotonic() < until, "the processes did not start"
        time.sleep(0.02)


def test_a_dry_run_prints_what_each_process_gets():
    arguments = ["--config=configs/shapes.py", '--config.prompts.negative=it\'s a "bad" one']
    done = local("--processes=3", "--devices-per-process=2", "--dry-run", "--", *arguments)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == 3
    for rank, words in enumerate(lines):
        assert words[-len(arguments) - 3 :] == [sys.executable, "-m", "smart_grpo_jax.main", *arguments]
        env = dict(word.split("=", 1) for word in words[1 : -len(arguments) - 3])
        address, processes, own = distributed.explicit_arguments(env) or ("", 0, 0)
        assert (processes, own) == (3, rank) and address == env["JAX_COORDINATOR_BIND_ADDRESS"]
        assert env["JAX_PLATFORMS"] == "cpu" and env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        assert f"{COUNT}=2" in env["XLA_FLAGS"].split()


def test_the_device_count_replaces_an_older_one_and_keeps_the_other_flags():
    flags = f"--xla_cpu_enable_fast_math=false {COUNT}=8"
    done = local("--processes=1", "--dry-run", "--", "--config=x", XLA_FLAGS=flags)
    env = dict(word.split("=", 1) for word in shlex.split(done.stdout) if word.startswith("XLA_FLAGS"))
    assert env["XLA_FLAGS"].split() == ["--xla_cpu_enable_fast_math=false", f"{COUNT}=1"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--processes=2"], "nothing after --"),
        (["--", "--config=x"], "--processes"),
        (["--processes=0", "--", "--config=x"], "got 0, wanted a whole number"),
        (["--processes=2", "--devices-per-process=x", "--", "--config=x"], "got x, wanted a whole number"),
        (["--processes=2", "--grace=-1", "--", "--config=x"], "got -1, wanted seconds"),
        (["--process=2", "--", "--config=x"], "--process"),
    ],
)
def test_mistakes_are_one_line(words, says):
    assert says in refused(local(*words))


def test_help_names_every_option():
    done = local("--help")
    assert done.returncode == 0
    for option in ("--processes", "--devices-per-process", "--grace", "--dry-run"):
        assert option in done.stdout


def test_every_line_carries_its_rank_and_keeps_its_stream(launcher):
    program = "print('out', rank)\nsys.stdout.write('no newline')\nprint('err', rank, file=sys.stderr)"
    code, out, err = finish(launcher(program, "--processes=2"))
    assert code == 0
    assert sorted(out) == ["[0] no newline", "[0] out 0", "[1] no newline", "[1] out 1"]
    assert sorted(err) == ["[0] err 0", "[1] err 1"]


def test_arguments_arrive_unchanged(launcher):
    words = ["--config.x=a b", "it's", "--dry-run"]
    code, out, _ = finish(launcher("print(sys.argv[1:])", "--processes=1", "--", *words))
    assert code == 0 and out == [f"[0] {words}"]


@pytest.mark.parametrize("code", [75, 2])
def test_the_first_failure_is_the_exit_code_and_the_others_are_ended(launcher, code):
    program = f"sys.exit({code}) if rank == 1 else time.sleep(60)"
    began = time.monotonic()
    got, _, err = finish(launcher(program, "--processes=3", "--grace=0.3"))
    assert got == code and time.monotonic() - began < 30
    assert err[0] == f"[launcher] process 1 ended with exit code {code}; 2 others have 0.3 s"
    assert err[-1] == f"[launcher] exit code {code}, from process 1"


def test_the_others_may_use_the_grace_period(launcher, tmp_path):
    program = "sys.exit(75) if rank == 0 else (time.sleep(1), open(sys.argv[1], 'w').close(), sys.exit(7))"
    code, _, _ = finish(launcher(program, "--processes=2", "--grace=30", "--", str(tmp_path / "saved")))
    assert code == 75 and (tmp_path / "saved").exists()


def test_a_killed_process_gives_the_shells_code(launcher):
    program = "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else time.sleep(60)"
    assert finish(launcher(program, "--processes=2", "--grace=0.2"))[0] == 128 + signal.SIGKILL


def test_where_one_was_killed_and_the_others_ask_for_a_restart_so_does_the_launcher(launcher):
    program = "os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else (time.sleep(1), sys.exit(75))"
    code, _, err = finish(launcher(program, "--processes=3", "--grace=20"))
    assert code == 75, err
    assert sum("ended with exit code 75" in line for line in err) == 2


def test_a_process_that_ignores_sigterm_is_killed(launcher):
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsys.exit(4) if rank == 0 else time.sleep(60)"
    code, _, err = finish(launcher(program, "--processes=2", "--grace=0.5"))
    assert code == 4 and any("SIGKILL" in line for line in err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(launcher, tmp_path, number):
    program = f"""
got = []
signal.signal({int(number)}, lambda n, f: got.append(n))
open(f"{tmp_path}/ready-{{rank}}", "w").close()
while not got:
    time.sleep(0.02)
time.sleep(0.3)
print(len(got))
sys.exit(75)
"""
    process = launcher(program, "--processes=2", "--grace=20")
    wait_for(tmp_path, 2)
    process.send_signal(number)
    code, out, _ = finish(process)
    assert code == 75 and sorted(out) == ["[0] 1", "[1] 1"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_no_process_outlives_a_killed_launcher(launcher, tmp_path):
    program = f"""
def leave(n, f):
    open("{tmp_path}/left-" + str(rank), "w").close()
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
open(f"{tmp_path}/ready-{{rank}}", "w").close()
time.sleep(60)
"""
    process = launcher(program, "--processes=2")
    wait_for(tmp_path, 2)
    process.kill()
    process.communicate(timeout=30)
    until = time.monotonic() + 30
    while len(list(tmp_path.glob("left-*"))) < 2:
        assert time.monotonic() < until, "a process still runs"
        time.sleep(0.05)


JOIN = """
from smart_grpo_jax.runtime import distributed
distributed.initialise()
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.numpy.arange(1) + rank).sum()
counts = jax.process_count(), jax.device_count(), jax.local_device_count(), int(total)
open(f"{sys.argv[1]}/{rank}", "w").write(repr(counts))
"""


@pytest.mark.slow
def test_processes_join_as_on_a_pod(launcher, tmp_path):
    process = launcher(JOIN, "--processes=2", "--devices-per-process=2", "--", str(tmp_path))
    code, _, err = finish(process)
    assert code == 0, err
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["(2, 4, 2, 1)"] * 2
