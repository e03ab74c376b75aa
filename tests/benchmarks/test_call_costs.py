"""The costs of calls: measured on a small model, read by the comparison."""

import json

import pytest

from benchmarks import call_costs
from smart_grpo_jax.jobs import compare
from tests.jobs.tiny_run import command


def test_the_least_time_is_the_one_of_a_program_that_is_compiled():
    assert 0 < call_costs.least(lambda x: x + 1, 3, 1.0) < 1


@pytest.mark.slow
def test_every_kind_of_call_has_a_cost_that_compare_reads(tmp_path):
    command(tmp_path / "run")  # writes the config
    assert (
        call_costs.main([str(tmp_path / "tiny.py"), f"--out={tmp_path / 'costs.json'}", "--repeats=3"]) == 0
    )
    stored = json.loads((tmp_path / "costs.json").read_text())
    assert stored["images"] == 16 and all(stored[n] > 0 for n in ("velocity", "backward", "decode", "reward"))
    price, origin = compare.prices(None, [str(tmp_path / "seed0")])
    assert price["velocity"] == 1.0 and "cpu" in origin
