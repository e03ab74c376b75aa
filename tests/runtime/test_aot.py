"""What a child's end means."""

import json
import sys
import textwrap

import pytest

from smart_grpo_jax.runtime import aot
from smart_grpo_jax.runtime.topologies import GIB, parse

OOM = (
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: a permanent error. "
    "Ran out of memory in memory space hbm. Used 98.80G of 15.75G hbm. Exceeded hbm capacity by 83.05G."
)


def test_a_refusal_is_read_with_its_numbers():
    found = aot.failure(1, f"Traceback\n{OOM}\nmore")
    assert found.verdict == aot.TOO_LARGE
    assert found.found == {"peak_bytes": 98.8 * GIB, "limit_bytes": 15.75 * GIB}
    assert found.reason == "the compiler asks for 98.80 GiB of a device, 15.75 are there"
    bare = aot.failure(1, "Traceback\nRESOURCE_EXHAUSTED: out of it\nmore")
    assert bare == aot.Outcome(aot.TOO_LARGE, {}, "RESOURCE_EXHAUSTED: out of it")
    other = "E1000: CompileTimeHbmOom: allocations (64.01G) exceed the available HBM (15.75G)"
    assert aot.failure(1, other).found["peak_bytes"] == 64.01 * GIB


@pytest.mark.parametrize("code", [-6, 134, 139, -9])
def test_a_compiler_that_ends_its_process_is_a_verdict(code):
    text = "F0000 llo_module.cc:12] Check failed: ok. Unimplemented DMA\n*** stack\n  frame 1\n"
    found = aot.failure(code, text)
    assert (found.verdict, "Check failed" in found.reason) == (aot.CRASHED, True)


def test_any_other_end_is_a_failure_with_its_last_line():
    found = aot.failure(1, "Traceback (most recent call last):\nValueError: no such thing\n\n")
    assert found == aot.Outcome(aot.FAILED, {}, "ValueError: no such thing")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A child of ours that does as it is told."""
    (tmp_path / "told_child.py").write_text(
        textwrap.dedent(
            """
            import json, os, sys, time
            asked = json.load(open(sys.argv[1]))
            if asked["do"] == "answer":
                json.dump({"got": asked["value"], "flag": os.environ["FLAG"]}, open(sys.argv[2], "w"))
            if asked["do"] == "abort":
                os.abort()
            if asked["do"] == "sleep":
                time.sleep(60)
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "told_child"


def test_a_child_answers_aborts_or_is_late(module):
    import os

    env = {**os.environ, "FLAG": "up"}
    answered = aot.child(module, {"do": "answer", "value": 7}, env, 60)
    assert answered == aot.Outcome(aot.FITS, {"got": 7, "flag": "up"})
    assert aot.child(module, {"do": "abort"}, env, 60).verdict == aot.CRASHED
    assert aot.child(module, {"do": "sleep"}, env, 0.5).verdict == aot.LATE


def test_the_childs_environment_has_the_devices_of_the_topology(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=3")
    flags = aot.environment(parse("cpu:8"), exact=False)["XLA_FLAGS"]
    assert flags.split() == ["--a=1", "--xla_force_host_platform_device_count=8"]
    quick, exact = (aot.environment(parse("v5e:2x2"), exact) for exact in (False, True))
    assert quick["JAX_OPTIMIZATION_LEVEL"] == aot.QUICK and "JAX_OPTIMIZATION_LEVEL" not in exact
    assert quick["JAX_PLATFORMS"] == "cpu" and json.dumps(quick) and sys.executable
