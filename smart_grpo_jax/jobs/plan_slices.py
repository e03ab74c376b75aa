"""Other slices by the estimate: how small could it be, how large must it be."""

from __future__ import annotations

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import microbatch
from smart_grpo_jax.jobs.footprint import Footprint
from smart_grpo_jax.jobs.plan_numbers import Slice
from smart_grpo_jax.runtime import topologies
from smart_grpo_jax.runtime.topologies import Topology


def estimate(config: Config, f: Footprint, topology: Topology) -> dict[str, float]:
    """Bytes on a device per phase, with what is automatic solved for this slice; UserError where the mesh
    of the config does not divide it."""
    assert topology.chip is not None
    settled, _ = microbatch.settle(config, f, topology.chips, topology.chip.usable)
    place = microbatch.place(settled, topology.chips, topology.chip.usable)
    return microbatch.peaks(f, place, microbatch.numbers_of(settled))


def would_fit(config: Config, f: Footprint, topology: Topology) -> bool:
    """Whether the estimate is under what a program may use."""
    if topology.chip is None:
        return True
    try:
        return max(estimate(config, f, topology).values()) <= topology.chip.usable
    except UserError:
        return False


def other(config: Config, f: Footprint, topology: Topology, fits: bool) -> Slice | None:
    """The smallest sold slice below that would fit, or the next one above; None where nothing is smaller."""
    if topology.kind not in topologies.SOLD or topology.slices > 1:
        return None
    if not fits:
        found = next((t for t in topologies.larger(topology) if would_fit(config, f, t)), None)
        return Slice(found.name if found else "", found is not None)
    below = [t for t in topologies.smaller(topology) if would_fit(config, f, t)]
    return Slice(below[-1].name, True) if below else None
