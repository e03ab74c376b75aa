import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rollout.py"


@pytest.mark.slow
def test_a_rollout_spends_its_time_in_the_network():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model=shapes", "--repeats=7", "--groups=4", "--members=8"],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["recompilations"] == 0 and found["batch"] == 32
    # the script's own floor is 0.8; a machine that is shared moves a median of seven by some percent
    assert found["ratio"] >= 0.7, done.stdout
    assert f"ratio {found['ratio']:.3f}" in done.stdout
