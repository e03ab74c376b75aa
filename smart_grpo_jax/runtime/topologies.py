"""The slices that are sold, and what their chips can do.

    v5e:4x4   v5p:2x2x2   v6e-8   2xv5e:16x16 (two slices)   cpu:8   gpu:h200:8

Chips: published peaks per chip (Google's and NVIDIA's data sheets). The compiler accepts more shapes than
are sold; a shape that is not in the table is refused with the nearest that is.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from smart_grpo_jax.core.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Dense bf16 FLOP/s, bytes of memory and of it usable by a program, bytes/s to memory, and bytes/s
    over all links of a chip to its slice (`ici`) or between slices and hosts (`dcn`, a host's share)."""

    name: str
    flops: float
    memory: float
    usable: float
    bandwidth: float
    ici: float
    dcn: float
    chips_per_host: int
    platform: str = "tpu"


CHIPS: Mapping[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 31.25 * GIB, 1.228e12, 300e9, 6.25e9, 4),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 15.75 * GIB, 819e9, 200e9, 3.1e9, 8),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 94.75 * GIB, 2.765e12, 600e9, 6.25e9, 4),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 31.25 * GIB, 1.64e12, 448e9, 12.5e9, 8),
    "a100": Chip("NVIDIA A100 80GB", 312e12, 80e9, 76e9, 2.039e12, 600e9, 25e9, 8, "gpu"),
    "h100": Chip("NVIDIA H100 SXM", 989e12, 80e9, 76e9, 3.35e12, 900e9, 50e9, 8, "gpu"),
    "h100pcie": Chip("NVIDIA H100 PCIe", 756e12, 80e9, 76e9, 2.0e12, 600e9, 25e9, 8, "gpu"),
    "h100nvl": Chip("NVIDIA H100 NVL", 835e12, 94e9, 90e9, 3.9e12, 600e9, 25e9, 8, "gpu"),
    "h200": Chip("NVIDIA H200", 989e12, 141e9, 134e9, 4.8e12, 900e9, 50e9, 8, "gpu"),
}

DEVICES: Mapping[str, str] = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H100 PCIe": "h100pcie",
    "NVIDIA H100 NVL": "h100nvl",
    "NVIDIA H200": "h200",
}
"""The start of a device's name in jax → its chip."""

SOLD: Mapping[str, tuple[str, ...]] = {
    "v4": (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    ),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
        "16x16x16", "16x16x24",
    ),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}  # fmt: skip
"""Topologies that can be ordered, smallest first."""

CORES_IN_NAME: Mapping[str, int] = {"v4": 2, "v5p": 2}
"""Where the number of an accelerator type (v5p-16) counts cores and not chips."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named set of chips; `shape` is the torus of one slice ("" where there is none)."""

    kind: str
    shape: str
    chips: int
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        many = f"{self.slices}x" if self.slices > 1 else ""
        return f"{many}{self.kind}:{self.shape or self.chips // self.slices}"

    @property
    def chip(self) -> Chip | None:
        """What one chip can do; None on a CPU, whose peaks nobody publishes."""
        return CHIPS.get(self.kind)

    @property
    def hosts(self) -> int:
        """Machines of the whole."""
        return -(-self.chips // (self.chip.chips_per_host if self.chip else self.chips))

    @property
    def accelerator(self) -> str:
        """The accelerator type that is ordered for one slice, such as v5p-16."""
        return f"{self.kind}-{self.chips // self.slices * CORES_IN_NAME.get(self.kind, 1)}"


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by its name; None where it is not in the table, for nothing is guessed."""
    known = [start for start in DEVICES if device_kind.startswith(start)]
    return CHIPS[DEVICES[max(known, key=len)]] if known else None


def volume(shape: str) -> int:
    """Chips of a torus such as 4x4x8."""
    return math.prod(int(side) for side in shape.split("x"))


def parse(text: str) -> Topology:
    """A topology from its name; UserError with the nearest one that is sold."""
    head = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)[:-](.+)", text)
    if head is None:
        raise UserError(f'--topology: got "{text}", wanted KIND:SHAPE, such as v5e:4x4, cpu:8 or gpu:h200:8')
    slices, kind, rest = int(head[1] or 1), head[2], head[3]
    if slices < 1:
        raise UserError(f'--topology: got "{text}", wanted at least one slice')
    if kind == "cpu":
        return Topology("cpu", "", slices * number(text, rest), slices)
    if kind == "gpu":
        name, _, count = rest.partition(":")
        cards = [known for known, chip in CHIPS.items() if chip.platform == "gpu"]
        if name not in cards:
            raise UserError(f'--topology: got "{text}" ({nearest(name, cards)})')
        return Topology(name, "", slices * number(text, count), slices)
    if kind not in SOLD:
        raise UserError(f'--topology: got "{text}" ({nearest(kind, [*SOLD, "cpu", "gpu"])})')
    shape = rest if "x" in rest else by_number(text, kind, rest)
    if shape not in SOLD[kind]:
        raise UserError(f'--topology: got "{text}", {kind} is sold as {", ".join(SOLD[kind])}')
    return Topology(kind, shape, slices * volume(shape), slices)


def number(text: str, digits: str) -> int:
    """A count of devices."""
    if not digits.isdecimal() or not 1 <= int(digits) <= 100_000:
        raise UserError(f'--topology: got "{text}", wanted a number of devices, such as cpu:8 or gpu:h200:8')
    return int(digits)


def by_number(text: str, kind: str, digits: str) -> str:
    """The shape of an accelerator type: v5e-16 is 4x4, v5p-16 (cores) is 2x2x2."""
    types = {str(volume(shape) * CORES_IN_NAME.get(kind, 1)): shape for shape in SOLD[kind]}
    if digits not in types:
        names = ", ".join(f"{kind}-{n}" for n in types)
        raise UserError(f'--topology: got "{text}", {kind} is sold as {names}')
    return types[digits]


def smaller(topology: Topology) -> list[Topology]:
    """The sold slices of the kind with fewer chips, largest first."""
    every = [Topology(topology.kind, shape, volume(shape)) for shape in SOLD.get(topology.kind, ())]
    return [one for one in reversed(every) if one.chips < topology.chips]


def larger(topology: Topology) -> list[Topology]:
    """The sold slices of the kind with more chips, smallest first."""
    every = [Topology(topology.kind, shape, volume(shape)) for shape in SOLD.get(topology.kind, ())]
    return [one for one in every if one.chips > topology.chips]
