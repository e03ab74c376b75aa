"""Compile for devices that are not here, in a process of its own.

libtpu's compiler runs on any Linux machine and answers with the allocator's own numbers. It may also end
the process that asked it; so a child asks, and its end is a verdict like any other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime import tpu_options
from smart_grpo_jax.runtime.mesh import make_mesh
from smart_grpo_jax.runtime.topologies import GIB, Topology

FITS, TOO_LARGE, CRASHED, FAILED, LATE = "fits", "does not fit", "compiler crashed", "failed", "not finished"

TPU_QUIET: Mapping[str, str] = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""No device, no metadata server, no lock file: only the compiler."""

QUICK = "O0"
"""The level of a quick compilation: less work on machine code. Memory and traffic of SD3.5-M's rollout and
update for v5e:4x4 were those of O1 to the byte, in half of the time."""

MEGACORE = ("v4",)
"""Chips whose two cores are one device; unsaid, the compiler counts cores."""


class Outcome(NamedTuple):
    """What became of a child: its verdict, what it measured, and the reason where it did not."""

    verdict: str
    found: Mapping[str, Any]
    reason: str = ""


def environment(topology: Topology, exact: bool) -> dict[str, str]:
    """The variables of a child that compiles for this topology."""
    here = dict(os.environ)
    here |= {"JAX_PLATFORMS": "cpu"}
    if topology.kind == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", here.get("XLA_FLAGS", ""))
        here["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.chips}".strip()
        return here
    options = tpu_options.init_args(here.get(tpu_options.VARIABLE, ""))
    here |= {**TPU_QUIET, "TPU_LOG_DIR": "disabled", tpu_options.VARIABLE: options}
    return here if exact else here | {"JAX_OPTIMIZATION_LEVEL": QUICK}


def mesh_of(topology: Topology, data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh of the topology's devices, whether they are here or not."""
    if topology.kind == "cpu":
        return make_mesh(data, fsdp, tensor, jax.devices()[: topology.chips])
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind in MEGACORE else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(f"{topology.kind}:{topology.shape}", "tpu", **options)
    except Exception as error:
        raise UserError(
            f"--topology: {topology.name}: libtpu knows no such slice ({brief(str(error))})"
        ) from None
    return make_mesh(data, fsdp, tensor, found.devices)


def child(module: str, request: Mapping[str, Any], env: Mapping[str, str], limit: float) -> Outcome:
    """Run `python -m module REQUEST RESULT` and tell how it ended."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "result.json"
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", module, str(asked), str(answer)]
        try:
            done = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return Outcome(LATE, {}, f"the compiler had not finished after {limit:.0f} s")
        if answer.is_file():
            return Outcome(FITS, json.loads(answer.read_text()))
        known = json.loads(counted(answer).read_text()) if counted(answer).is_file() else {}
        end = failure(done.returncode, done.stderr)
        return end._replace(found={**known, **end.found})


def counted(answer: str | Path) -> Path:
    """Where a child leaves what it knows before it asks the compiler."""
    return Path(f"{answer}.counted")


OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|CompileTimeHbmOom|Ran out of memory", re.IGNORECASE)
WANTED = re.compile(r"Used ([\d.]+)([GMK]) of ([\d.]+)([GMK])|\(([\d.]+)([GMK])\)[^.]*?\(([\d.]+)([GMK])\)")
UNITS = {"G": GIB, "M": 2**20, "K": 2**10}


def failure(code: int, stderr: str) -> Outcome:
    """The verdict on a child that left no result."""
    if OUT_OF_MEMORY.search(stderr):
        found = wanted(stderr)
        return Outcome(TOO_LARGE, found, asked_too_much(found) or brief(line_with(OUT_OF_MEMORY, stderr)))
    if code < 0 or code in (134, 136, 139):
        return Outcome(CRASHED, {}, brief(last_line(stderr)) or f"exit status {code}")
    return Outcome(FAILED, {}, brief(last_line(stderr)) or f"exit status {code}")


def wanted(text: str) -> dict[str, float]:
    """The bytes that the compiler wanted and had, from its refusal."""
    found = WANTED.search(text)
    if not found:
        return {}
    numbers = [part for part in found.groups() if part is not None]
    return {
        "peak_bytes": float(numbers[0]) * UNITS[numbers[1]],
        "limit_bytes": float(numbers[2]) * UNITS[numbers[3]],
    }


def asked_too_much(found: Mapping[str, float]) -> str:
    """The refusal in words; empty where it had no numbers."""
    if not found:
        return ""
    asked, there = (found[name] / GIB for name in ("peak_bytes", "limit_bytes"))
    return f"the compiler asks for {asked:.2f} GiB of a device, {there:.2f} are there"


def line_with(pattern: re.Pattern[str], text: str) -> str:
    """The first line that matches."""
    return next((line for line in text.splitlines() if pattern.search(line)), "")


def last_line(text: str) -> str:
    """The last line that says something; a check that failed inside the compiler goes before it."""
    lines = [line for line in text.splitlines() if line.strip()]
    checks = [line for line in lines if "Check failed" in line]
    return (checks or lines or [""])[-1]


def brief(text: str) -> str:
    """At most 160 characters of one line."""
    return " ".join(text.split())[:160]
