import shlex
import shutil
import subprocess
import tarfile

import pytest
from fake_commands import LAUNCH, Machine, refused

PLACE = {"PROJECT": "p", "ZONE": "us-west4-a", "NAME": "run"}
STORE = {"BUCKET": "gs://bucket/runs"}
SLICE = {**PLACE, **STORE, "TYPE": "v5litepod-16"}
WHERE = ["--project=p", "--zone=us-west4-a"]
SPEECH = ["--config=configs/shapes.py", '--config.prompts.negative=it\'s a "bad" $HOME; one']


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, "gcloud", "sleep")


def remote(call):
    """The words that the worker's shell makes of --command."""
    return shlex.split(
        next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    )


@pytest.mark.parametrize(
    ("capacity", "flags"), [("on-demand", []), ("spot", ["--spot"]), ("reserved", ["--reserved"])]
)
def test_create_asks_for_a_queued_resource(machine, capacity, flags):
    assert machine.run("tpu_pod.sh", "create", CAPACITY=capacity, **SLICE).returncode == 0
    asked = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=run"]
    assert machine.calls() == [
        ["gcloud", "compute", "tpus", "queued-resources", "create", "run", *WHERE, *asked, *flags]
    ]


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_version_follows_from_the_type(machine, kind, version):
    machine.run("tpu_pod.sh", "create", f"--type={kind}", **PLACE)
    assert f"--runtime-version={version}" in machine.calls()[0]


def test_an_unknown_type_needs_a_runtime_version(machine):
    assert "v9-8" in refused(machine.run("tpu_pod.sh", "create", TYPE="v9-8", **PLACE))
    assert machine.run("tpu_pod.sh", "create", TYPE="v9-8", RUNTIME_VERSION="new", **PLACE).returncode == 0
    assert {"--accelerator-type=v9-8", "--runtime-version=new"} <= set(machine.calls()[0])


def test_two_slices_are_two_nodes_of_one_request(machine):
    machine.run("tpu_pod.sh", "create", SLICES="2", **SLICE)
    machine.run("tpu_pod.sh", "stop", SLICES="2", **SLICE)
    created, *stopped = machine.calls()
    assert {"--node-count=2", "--node-prefix=run"} <= set(created)
    assert [call[5] for call in stopped] == ["run-0", "run-1"]


def test_run_hands_the_arguments_unchanged_to_every_worker(machine):
    assert machine.run("tpu_pod.sh", "run", "--", *SPEECH, **SLICE).returncode == 0
    (call,) = machine.calls()
    assert call[:9] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run", *WHERE, "--worker=all"]
    words = remote(call)
    assert words[0] == "env" and {"BUCKET=gs://bucket/runs", "RUNS=/mnt/runs"} <= set(words)
    assert words[words.index("run") :] == ["run", "--", *SPEECH, "--workdir=/mnt/runs/run"]


def test_a_workdir_of_the_user_stays(machine):
    machine.run("tpu_pod.sh", "run", "--", "--config=c", "--workdir", "/mnt/runs/x", **SLICE)
    assert remote(machine.calls()[0])[-4:] == ["--", "--config=c", "--workdir", "/mnt/runs/x"]


@pytest.mark.parametrize(
    "command", ["create", "wait", "install", "run", "logs", "status", "stop", "resume", "delete"]
)
def test_a_dry_run_prints_the_very_calls_and_makes_none(tmp_path, command):
    (tmp_path / "dry").mkdir()
    (tmp_path / "real").mkdir()
    dry, real = Machine(tmp_path / "dry", "gcloud"), Machine(tmp_path / "real", "gcloud", "sleep")
    real.answer((["describe", "--format=value(state.state)"], "ACTIVE", 0))
    words = [command, "--", *SPEECH] if command in ("run", "resume") else [command]
    printed = dry.run("tpu_pod.sh", "--dry-run", *words, **SLICE)
    done = real.run("tpu_pod.sh", *words, **SLICE)
    assert (printed.returncode, done.returncode) == (0, 0), printed.stderr + done.stderr
    assert dry.calls() == []
    lines = [shlex.split(line) for line in printed.stdout.splitlines()]
    if command == "resume":  # printed for a slice that is gone, made here for one that is still there
        assert [line for line in lines if line[:4] != ["gcloud", "compute", "tpus", "queued-resources"]][
            -1:
        ] == (real.calls()[-1:])
        assert [line[4] for line in lines] == [
            "describe",
            "delete",
            "create",
            "describe",
            "scp",
            "ssh",
            "ssh",
        ]
    elif command == "install":  # the archive lies in a folder of its own
        assert [line[:5] for line in lines] == [call[:5] for call in real.calls()]
        assert lines[1] == real.calls()[1]
    else:
        assert lines == real.calls()


def test_install_sends_this_checkout_without_what_git_ignores(machine, tmp_path):
    keep = tmp_path / "kept.tgz"
    fake = machine.bin / "gcloud"
    fake.write_text(f'#!/bin/sh\nfor w in "$@"; do case $w in /*.tgz) cp "$w" {keep} ;; esac; done\n')
    assert machine.run("tpu_pod.sh", "install", **SLICE).returncode == 0
    with tarfile.open(keep) as archive:
        names = set(archive.getnames())
    assert {"setup.py", "launch/worker.sh", "smart_grpo_jax/main.py"} <= names
    assert not [n for n in names if "__pycache__" in n or n.startswith((".git/", "runs/"))]


def test_install_without_a_checkout_needs_a_repository(machine, tmp_path):
    folder = tmp_path / "copy" / "launch"
    shutil.copytree(LAUNCH, folder)
    command = ["bash", str(folder / "tpu_pod.sh"), "install"]
    env = machine.env(GIT_CEILING_DIRECTORIES=str(tmp_path), **SLICE)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "REPO: is not set and this is no git checkout" in refused(done)


def test_install_from_a_repository_clones_it(machine):
    machine.run("tpu_pod.sh", "install", REPO="https://host/x.git", REF="v1", **SLICE)
    (call,) = machine.calls()
    words = remote(call)
    assert words[words.index("clone") :][:6] == ["clone", "--quiet", "--depth", "1", "--branch", "v1"]
    assert "https://host/x.git" in words and words[-1] == "install"


@pytest.mark.parametrize(("state", "code"), [("ACTIVE", 0), ("FAILED", 1), ("SUSPENDED", 75)])
def test_wait_ends_with_what_became_of_the_request(machine, state, code):
    machine.answer((["describe"], state, 0))
    assert machine.run("tpu_pod.sh", "wait", **PLACE).returncode == code


def test_wait_gives_up_after_its_timeout(machine):
    machine.answer((["describe"], "WAITING_FOR_RESOURCES", 0))
    done = machine.run("tpu_pod.sh", "wait", "--timeout=60", "--poll=30", **PLACE)
    assert done.returncode == 1 and "still WAITING_FOR_RESOURCES" in done.stderr
    assert [call for call in machine.calls() if call[0] == "sleep"] == [["sleep", "30"]] * 2


def test_resume_of_a_living_slice_only_runs(machine):
    machine.answer((["describe"], "ACTIVE", 0))
    assert machine.run("tpu_pod.sh", "resume", "--", *SPEECH, **SLICE).returncode == 0
    assert [call[4] for call in machine.calls()] == ["describe", "ssh"]


def test_resume_of_a_missing_slice_asks_for_a_new_one(machine):
    machine.answer((["--format=value(state.state)"], "", 1))
    done = machine.run("tpu_pod.sh", "resume", "--", *SPEECH, **SLICE)
    # The fake never becomes active: the script ends at `wait`, after it has asked.
    assert done.returncode != 0
    assert [call[4] for call in machine.calls()] == ["describe", "create", "describe"]


def test_resume_of_a_preempted_slice_deletes_it_first(machine):
    machine.answer((["--format=value(state.state)"], "SUSPENDED", 0))
    assert machine.run("tpu_pod.sh", "resume", "--", *SPEECH, **SLICE).returncode == 75
    assert [call[4] for call in machine.calls()] == ["describe", "delete", "create", "describe"]


def test_logs_follow_one_worker_or_all(machine):
    machine.run("tpu_pod.sh", "logs", **PLACE)
    machine.run("tpu_pod.sh", "logs", "--worker", "all", **PLACE)
    assert [call[8] for call in machine.calls()] == ["--worker=0", "--worker=all"]


def test_a_failing_call_ends_the_script_with_its_code(machine):
    machine.answer((["ssh"], "", 9))
    assert machine.run("tpu_pod.sh", "run", "--", *SPEECH, **SLICE).returncode == 9


@pytest.mark.parametrize(
    ("words", "settings", "says"),
    [
        ([], {}, "no command"),
        (["creat"], {}, "creat: no such command"),
        (["create"], {}, "PROJECT: is not set, wanted e.g. PROJECT="),
        (["create"], {"PROJECT": "p"}, "ZONE: is not set"),
        (["create"], {"PROJECT": "p", "ZONE": "z"}, "NAME: is not set"),
        (["create"], PLACE, "TYPE: is not set"),
        (["create", "--type=v5e-16"], PLACE, "wanted v5litepod-16"),
        (["create", "--type=v6e-7"], PLACE, "got v6e-7"),
        (
            ["create", "--capacity=cheap"],
            SLICE,
            "CAPACITY: got cheap, wanted one of: on-demand spot reserved",
        ),
        (["create", "--slices=0"], SLICE, "SLICES: got 0"),
        (["create", "--zon=z"], SLICE, "--zon: no such flag"),
        (["create", "--zone"], SLICE, "--zone: has no value"),
        (["run"], SLICE, "nothing after --"),
        (["run", "--", "--config=x"], PLACE, "BUCKET: is not set"),
        (["run", "--", "--config=x"], {**PLACE, "BUCKET": "bucket"}, "BUCKET: got bucket"),
        (["run", "--", "--workdir=gs://b/x"], SLICE, "--workdir: got gs://b/x"),
        (["logs", "--worker=first"], PLACE, "WORKER: got first"),
    ],
)
def test_mistakes_are_one_line_before_any_call(machine, words, settings, says):
    assert says in refused(machine.run("tpu_pod.sh", *words, **settings))
    assert machine.calls() == []


def test_the_table_of_types_needs_no_settings(machine):
    assert "v5litepod" in machine.run("tpu_pod.sh", "types").stdout


def test_quoting_survives_a_shell(tmp_path):
    words = ["plain", "", "a b", "it's", '"x"', "$HOME `id` ; & | > * ~ \\", "ä", "two\nlines"]
    script = f'. {LAUNCH / "settings.sh"}; quote "$@"'
    line = subprocess.run(
        ["bash", "-c", script, "x", *words], capture_output=True, text=True, check=True
    ).stdout
    assert shlex.split(line) == words
    again = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    assert again.stdout.split("\0")[:-1] == words
