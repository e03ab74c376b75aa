"""The benchmark of attention: what it measures here, and what it asks of a compiler."""

import json

from benchmarks import attention as benchmark


def test_the_device_that_is_here_runs_what_it_can(capsys):
    assert benchmark.main(["--shape=1,64,2,8", "--dtype=float32", "--repeats=3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"shape", "dtype", "where", "xla", "chunked"}
    for name in ("xla", "chunked"):
        assert found[name]["forward_ms"] > 0 and found[name]["gradient_ms"] > 0
        assert found[name]["error"] < 1e-6  # float32 against float32, sums in another order


def test_a_slice_is_offered_what_it_runs():
    assert benchmark.names("v5e:2x2", "bfloat16") == ["xla", "chunked", "splash"]
    assert benchmark.names("cpu:4", "float32") == ["xla", "chunked"]


def test_a_compiler_is_asked_in_a_child():
    found = benchmark.ask("chunked", "cpu:2", (1, 512, 2, 8), "float32")
    assert found["gradient_MiB"] >= found["forward_MiB"] > 0
    failed = benchmark.ask("splash", "cpu:2", (1, 512, 2, 8), "float32")
    assert failed["verdict"] == "failed" and "interpret" in failed["reason"].lower()
