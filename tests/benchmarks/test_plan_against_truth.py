"""A plan's peak on this machine against the memory that the kernel saw."""

import sys
from pathlib import Path

import pytest

from tests.jobs import tiny_run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plan_against_truth as truth


def test_every_case_is_a_config_and_a_known_program():
    for case, (program, _) in truth.CASES.items():
        assert truth.config_of(case, "shapes").model.path == "shapes"
        assert program in truth.PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize("case", ["update, all weights", "rollout, decoded in pieces"])
def test_the_peak_of_a_plan_is_the_peak_of_a_run(case):
    """10 %: beside the program's buffers there are threads and the libraries' own copies of matrices."""
    found = truth.compare(case, str(tiny_run.one_layer()))
    assert found["measured"] > 2**29, "too small to be told from what else a process holds"
    assert abs(found["off"]) < truth.TOLERANCE, truth.text({case: found})
