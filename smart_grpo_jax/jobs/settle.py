"""What `auto` comes to on the devices of this run, told before anything is loaded."""

from __future__ import annotations

import jax

from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.jobs import footprint, microbatch, plan_programs
from smart_grpo_jax.runtime.mesh import make_mesh
from smart_grpo_jax.runtime.progress import say
from smart_grpo_jax.runtime.topologies import GIB, chip_of


def settled(config: Config) -> Config:
    """The config with numbers where `memory.*`, `search.chunk` or `mesh.fsdp` is `auto`.

    All processes come to the same numbers: they follow from the config and the kind of the devices.
    """
    if not microbatch.automatic(config):
        return config
    devices, limit = jax.device_count(), device_limit()
    found = None
    if limit:
        tried = microbatch.trial(config, devices)
        mesh = make_mesh(tried.mesh.data, tried.mesh.fsdp, tried.mesh.tensor)
        found = footprint.of(plan_programs.paper(tried, mesh))
    made, why = microbatch.settle(config, found, devices, limit)
    numbers = microbatch.words(microbatch.numbers_of(made), searched_steps(made))
    known = f"{limit / GIB:.1f} GiB a device" if limit else "all at once: nobody knows what a device holds"
    say(f"at once: {numbers} ({known}); mesh.fsdp {made.mesh.fsdp} ({why})")
    return made


def device_limit() -> float | None:
    """Bytes that a program may use of a device: what the runtime says, rounded down to a GiB so that no two
    hosts differ, and at most what the table says; None where neither says anything."""
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    stated = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
    known = [chip.usable] if chip else []
    return min([*known, *([float(stated // GIB * GIB)] if stated else [])], default=None)
