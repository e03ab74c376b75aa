"""What travels between devices, read from the compiled programs of the tiny run on eight of them."""

import functools
import json
import math
import re
import subprocess
import sys

import pytest
import tiny_run

LORA = ("adapter.kind=lora", "sampler.guidance=3")
SMALL = 256
"""Bytes of counters, norms and means of metrics; a latent of one image has 576 and an image 1,728."""


@functools.cache
def compiled(program, *changes):
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.compiled_programs", program, *changes],
        env=tiny_run.environment(JAX_NUM_CPU_DEVICES="8"),
        cwd=tiny_run.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def parts(shape):
    """The arrays of one collective, as sorted dimensions without those of size 1."""
    dims = [d.split(",") for d in re.findall(r"\w+\[([\d,]*)\]", shape)]
    return [tuple(sorted(int(n) for n in d if n and n != "1")) for d in dims]


def belongs(row, leaves):
    """Whether all arrays of a collective are leaves, layers of stacked leaves, or parts of either cut over
    the mesh; of the table of positions any crop."""
    plain = lambda dims: tuple(sorted(n for n in dims if n != 1))
    known = {plain(dims) for leaf in leaves for dims in (leaf, leaf[1:])}
    part = lambda dims, of: len(dims) == len(of) and all(o % d == 0 for d, o in zip(dims, of, strict=True))
    fits = lambda dims: math.prod(dims) * 4 <= SMALL or any(part(dims, of) for of in known)
    return "pos_embed" in row["op_name"] or all(fits(dims) for dims in parts(row["shape"]))


def travels(found, kinds=()):
    """Collectives over the axes of the batch that carry more than small change."""
    return [
        one
        for one in found["collectives"]
        if set(one["axes"]) & {"data", "fsdp"}
        and one["sent"] / one["times"] > SMALL
        and (not kinds or one["kind"] in kinds)
    ]


def told(rows):
    return "\n".join(f"{r['kind']} {r['axes']} {r['shape']} {r['op_name']}" for r in rows)


def test_a_rollout_over_data_alone_sends_nothing():
    """Search, decode and reward included: an image is drawn, judged and searched on its own device."""
    rows = travels(compiled("rollout", *LORA))
    assert not rows, told(rows)


def test_an_update_of_adapters_sums_their_gradients_and_sends_nothing_else():
    found = compiled("update", *LORA)
    rows = travels(found)
    assert {one["kind"] for one in rows} == {"all-reduce"}, told(rows)
    assert all(belongs(one, found["trained"]) for one in rows), told(rows)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["rollout", "update"])
@pytest.mark.parametrize("mesh", ["mesh.fsdp=2", "mesh.fsdp=8", "mesh.fsdp=2 mesh.tensor=2"])
def test_over_fsdp_only_weights_and_gradients_travel(program, mesh):
    found = compiled(program, *LORA, *mesh.split())
    gathers = travels(found, ("all-gather",))
    assert gathers and all(belongs(one, found["weights"]) for one in gathers), told(gathers)
    others = [one for one in travels(found) if one["kind"] != "all-gather"]
    assert all(belongs(one, found["trained"]) for one in others), told(others)
    assert (program == "update") == bool(others)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ppo", "nft"])
def test_all_weights_are_gathered_layer_by_layer_and_their_gradients_summed_into_their_parts(loss):
    found = compiled("update", "mesh.fsdp=8", f"train.loss={loss}")
    rows = travels(found)
    assert all(belongs(one, found["weights"]) for one in rows), told(rows)


@pytest.mark.parametrize("changes", [LORA, pytest.param(("mesh.fsdp=8",), marks=pytest.mark.slow)])
def test_the_new_state_takes_the_memory_of_the_old_one(changes):
    found = compiled("update", *changes)
    assert found["donated"] >= 0.99 * found["state"]


@pytest.mark.slow
def test_a_state_of_all_weights_is_cut_over_fsdp():
    whole, cut = (compiled("update", f"mesh.fsdp={n}")["state"] for n in (1, 8))
    assert cut < whole / 5, (cut, whole)


@pytest.mark.slow
def test_the_tests_that_need_several_devices_pass_on_eight():
    files = ("tests/policy/test_pieces.py", "tests/hub/test_sharding.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=tiny_run.environment(JAX_NUM_CPU_DEVICES="8"),
        cwd=tiny_run.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
