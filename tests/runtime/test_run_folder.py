import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smart_grpo_jax.core.errors import LockedError, StorageError, UserError
from smart_grpo_jax.runtime import run_folder as module
from smart_grpo_jax.runtime.files import write_atomic, write_json
from smart_grpo_jax.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIG = {"seed": 1, "train": {"epochs": 5, "learning_rate": 1e-4}, "search": {"steps": (1, 2)}}


def open_folder(path, config=CONFIG, **options):
    return RunFolder.open(path, config=config, command=["main.py", "--a b"], **options)


def test_the_folder_tells_how_to_repeat_the_run(tmp_path):
    for _ in range(2):
        with open_folder(tmp_path / "deep" / "run") as folder:
            assert json.loads(folder.file("config.json").read_text()) == json.loads(json.dumps(CONFIG))
            env = json.loads(folder.file("env.json").read_text())
            assert folder.sub("samples").is_dir()
            assert os.fspath(folder) == str(tmp_path / "deep" / "run")
    assert env["versions"]["jax"] and env["host"] == socket.gethostname() and env["devices"]
    lines = (tmp_path / "deep" / "run" / "command.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(line.endswith("main.py '--a b'") for line in lines)


def test_the_first_field_that_differs_is_named(tmp_path):
    open_folder(tmp_path).close()
    changed = json.loads(json.dumps(CONFIG))
    changed["train"]["learning_rate"] = 2e-4
    with pytest.raises(UserError) as error:
        open_folder(tmp_path, changed)
    assert error.value.line == (
        "train.learning_rate: this run was started with 0.0001, got 0.0002; "
        "use another --workdir or the old value"
    )
    with pytest.raises(UserError, match=r"seed: this run was started with 1, got nothing"):
        open_folder(tmp_path, {k: v for k, v in CONFIG.items() if k != "seed"})
    with pytest.raises(UserError, match=r"seed: this run was started with 1, got true"):
        open_folder(tmp_path, {**CONFIG, "seed": True})
    with open_folder(tmp_path) as folder:  # a refused start changed nothing and let go of the lock
        assert json.loads(folder.file("config.json").read_text())["train"]["learning_rate"] == 1e-4


def test_fields_without_meaning_for_the_run_may_change(tmp_path):
    def semantic(config):
        return {key: value for key, value in config.items() if key != "train"}

    open_folder(tmp_path, semantic=semantic).close()
    longer = {**CONFIG, "train": {"epochs": 50}}
    with open_folder(tmp_path, longer, semantic=semantic) as folder:
        assert json.loads(folder.file("config.json").read_text())["train"] == {"epochs": 50}


def test_a_second_owner_is_refused_and_told_whom_it_met(tmp_path):
    with open_folder(tmp_path):
        with pytest.raises(LockedError) as error:
            open_folder(tmp_path)
        assert error.value.exit_code == 3
        assert f"in use by pid {os.getpid()} on {socket.gethostname()} since 20" in error.value.line
    open_folder(tmp_path).close()


SECOND = """
import sys, time
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime.run_folder import RunFolder
try:
    folder = RunFolder.open(sys.argv[1], config={}, command=sys.argv)
except UserError as error:
    print(error.line, file=sys.stderr)
    sys.exit(error.exit_code)
print("open", flush=True)
time.sleep(100)
"""


def test_two_starts_one_owner_and_a_killed_owner_leaves_no_lock(tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", SECOND, tmp_path], env=env, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"open\n"
        second = subprocess.run(
            [sys.executable, "-c", SECOND, tmp_path], env=env, capture_output=True, text=True, timeout=300
        )
        assert second.returncode == 3
        assert f"in use by pid {first.pid} on" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == first.pid
    RunFolder.open(tmp_path, config={}, command=[]).close()


def test_a_place_where_nothing_can_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        open_folder(tmp_path / "file" / "run")
    assert error.value.exit_code == 6
    assert error.value.line.endswith("Not a directory")
    open_folder(tmp_path / "run").close()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(StorageError, match=r"config.json: is not readable"):
        open_folder(tmp_path / "run")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomic(path, "half")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_leftovers_of_a_killed_write_go_at_the_next_start(tmp_path):
    (tmp_path / ".env.json.tmp-123").write_text("half")
    open_folder(tmp_path).close()
    assert not list(tmp_path.glob(".*"))


def test_the_commit_is_that_of_this_checkout_or_none(tmp_path):
    assert module.git_commit(tmp_path) is None
    inside = module.git_commit(Path(module.__file__).parent)
    assert inside is None or len(inside.removesuffix("+changes")) == 40
