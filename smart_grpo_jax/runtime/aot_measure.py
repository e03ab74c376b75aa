"""What a compiler says of a program: bytes on a device, traffic by axis, largest buffers.

Compiled programs are kept where a folder is given, named by what was compiled: another config with the same
program (Flow-GRPO and Smart-GRPO), or newer code that has not changed it, costs a trace and no compilation.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from smart_grpo_jax.runtime import hlo, hlo_memory, tpu_options
from smart_grpo_jax.runtime.files import write_atomic

SETTINGS = ("JAX_OPTIMIZATION_LEVEL", "XLA_FLAGS", tpu_options.VARIABLE)
"""Variables that a compiler listens to."""


def measure(
    jitted: Any,
    args: Sequence[Any],
    mesh: Mesh,
    platform: str,
    often: float | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Compile and say what the compiler says: bytes on a device, traffic by axis, largest buffers. `often` is
    the share of times that a conditional takes its costlier branch (None: it always does); where it is
    given, `never` is what moves if it never does. What was compiled lies in `kept`, if that is given, and
    is not compiled again."""
    lowered = jitted.trace(*args).lower(lowering_platforms=(platform,))
    made = compiled(lowered, mesh, kept)
    module = hlo.parse(made.pop("text"))
    share = 1.0 if often is None else often
    traffic = hlo.collectives(module, dict(mesh.shape), share)
    found = {
        **made,
        **moving(module, traffic, share),
        "collectives": [one._asdict() for one in traffic[:8]],
        "buffers": [one._asdict() for one in hlo.buffers(module, 8)],
    }
    if often is not None:
        found["never"] = moving(module, hlo.collectives(module, dict(mesh.shape), 0.0), 0.0)
    return found


def moving(module: hlo.Module, traffic: Sequence[hlo.Collective], often: float) -> dict[str, Any]:
    """Bytes that a device sends, by axes, and moves between its memory and its units."""
    by_axis: dict[str, float] = {}
    for one in traffic:
        axes = "+".join(one.axes)
        by_axis[axes] = by_axis.get(axes, 0.0) + one.sent
    return {"sent_bytes": by_axis, "memory_bytes": hlo_memory.moved(module, often)}


def compiled(lowered: Any, mesh: Mesh, kept: Path | None) -> dict[str, Any]:
    """The compiled program's text, its bytes on a device, and the seconds that the compiler took."""
    file = kept / f"{question(lowered, mesh)}.json.gz" if kept else None
    if file is not None and file.is_file():
        return dict(json.loads(gzip.decompress(file.read_bytes())))
    started = time.monotonic()
    program = lowered.compile()
    seconds = time.monotonic() - started
    made = {"text": program.as_text(), "compile_seconds": seconds, **memory_of(program)}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, gzip.compress(json.dumps(made).encode(), compresslevel=3))
    return made


def question(lowered: Any, mesh: Mesh) -> str:
    """A digest of a program, the devices that it is for, and the compiler with its settings."""
    devices = [str(device) for device in mesh.devices.flat]
    settings = [os.environ.get(name, "") for name in SETTINGS]
    digest = hashlib.sha256(json.dumps([jax.__version__, libtpu_version(), devices, settings]).encode())
    digest.update(lowered.as_text().encode())
    return digest.hexdigest()[:24]


def memory_of(compiled: Any) -> dict[str, float]:
    """Bytes on a device by the compiler's own allocator."""
    memory = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    if peak < memory.temp_size_in_bytes:  # the CPU's compiler leaves temporaries out of it
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
    }


def libtpu_version() -> str:
    """The version of libtpu, if it is there."""
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return ""
