import shlex
import signal
import subprocess
import time

import pytest
from fake_commands import LAUNCH, Machine

SPEECH = [
    "--config=configs/x.py",
    "--workdir=/scratch/x",
    '--config.prompts.negative=it\'s a "bad" $HOME one',
]
INSIDE = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_ON_NODE": "64",
}


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path, "srun", "scontrol", "scancel", "squeue", "python")
    made.answer((["squeue"], "RUNNING", 0))
    return made


def asked(machine, name):
    return [call for call in machine.calls() if call[0] == name]


def test_one_process_for_each_gpu_with_its_share_of_the_cores(machine):
    assert machine.run("slurm.sbatch", *SPEECH, **INSIDE).returncode == 0
    ((*words,),) = asked(machine, "srun")
    assert {
        "--nodes=3",
        "--ntasks=12",
        "--ntasks-per-node=4",
        "--cpus-per-task=16",
        "--gpu-bind=none",
    } <= set(words)
    assert words[-len(SPEECH) - 3 :] == ["python", "-m", "smart_grpo_jax.main", *SPEECH]
    assert asked(machine, "scontrol") == []


def test_one_process_for_each_node(machine):
    machine.run("slurm.sbatch", *SPEECH, PER="node", **INSIDE)
    ((*words,),) = asked(machine, "srun")
    assert {"--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(words)


def test_a_dry_run_prints_the_very_call(machine):
    printed = machine.run("slurm.sbatch", "--dry-run", *SPEECH, **INSIDE)
    assert machine.calls() == []
    machine.run("slurm.sbatch", *SPEECH, **INSIDE)
    assert [shlex.split(line) for line in printed.stdout.splitlines()] == asked(machine, "srun")


@pytest.mark.parametrize(
    ("code", "state", "count", "requeued"),
    [
        (75, "RUNNING", "0", True),
        (137, "RUNNING", "0", True),
        (0, "RUNNING", "0", False),
        (2, "RUNNING", "0", False),
        (4, "RUNNING", "0", False),
        (75, "COMPLETING", "0", False),
        (75, "CANCELLED", "0", False),
        (75, "RUNNING", "100", False),
    ],
)
def test_the_job_requeues_itself_after_75_and_signals_unless_cancelled(machine, code, state, count, requeued):
    machine.answer((["srun"], "", code), (["squeue"], state, 0))
    done = machine.run("slurm.sbatch", *SPEECH, SLURM_RESTART_COUNT=count, **INSIDE)
    assert done.returncode == code
    assert asked(machine, "scontrol") == [["scontrol", "requeue", "7"]] * requeued


@pytest.mark.parametrize(("state", "told"), [("RUNNING", True), ("COMPLETING", False)])
def test_near_its_end_the_job_tells_the_processes_and_requeues(machine, tmp_path, state, told):
    machine.answer((["squeue"], state, 0))
    # The processes save and end with 0 once scancel has told them, or by themselves where it did not.
    (machine.bin / "srun").write_text(
        f"#!/bin/sh\ntouch {tmp_path}/ready\ni=0\n"
        f"while ! grep -q scancel {machine.log} 2>/dev/null && [ $i -lt 20 ]; do\n"
        "i=$((i+1)); sleep 0.1; done\n"
    )
    command = ["bash", str(LAUNCH / "slurm.sbatch"), *SPEECH]
    script = subprocess.Popen(command, env=machine.env(**INSIDE), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=30)
    assert script.returncode == 0
    assert asked(machine, "scancel") == [["scancel", "--signal=TERM", "7"]] * told
    assert asked(machine, "scontrol") == [["scontrol", "requeue", "7"]] * told


def test_the_setup_file_is_read_first(machine, tmp_path):
    setup = tmp_path / "activate"
    setup.write_text("PYTHON=changed; export MARK=1\necho sourced\n")
    done = machine.run("slurm.sbatch", *SPEECH, SETUP=str(setup), **INSIDE)
    assert "sourced" in done.stdout and done.returncode == 0


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ([], INSIDE, "no arguments"),
        (["--config=x"], INSIDE, "--workdir: is missing"),
        (SPEECH, {**INSIDE, "PER": "rack"}, "PER: got rack"),
        (SPEECH, {**INSIDE, "PYTHON": "nowhere"}, "PYTHON: no nowhere"),
        (SPEECH, {}, "not inside a SLURM job"),
        (SPEECH, {**INSIDE, "SETUP": "/nowhere"}, "SETUP"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(machine, words, settings, says):
    done = machine.run("slurm.sbatch", *words, **settings)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
    assert asked(machine, "srun") == []


def test_sbatch_is_told_to_warn_before_the_end_and_to_keep_the_log():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append"} <= set(directives)
    assert lines[1 : 1 + len(directives)] == [f"#SBATCH {d}" for d in directives], "sbatch reads only the top"
