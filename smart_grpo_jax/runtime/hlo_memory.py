"""Bytes that a compiled program moves between a device's memory and its units, read from its HLO text.

Every instruction outside fusions reads its operands and writes its result, as often as it runs. A fusion that
only takes slices of an operand reads the slices; one that writes into an operand writes what is new. What
lies in a memory on the chip (a layout with `S(1)`) costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from smart_grpo_jax.runtime import hlo
from smart_grpo_jax.runtime.hlo import Instruction, Module

FREE = frozenset(
    """after-all bitcast call conditional constant get-tuple-element iota opt-barrier parameter partition-id
    replica-id tuple while""".split()
)
"""What moves nothing itself."""

SLICES = frozenset(("dynamic-slice", "gather", "slice"))
PLACED = re.compile(r"[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?")

Shapes = Mapping[str, str]


def moved(module: Module, often: float = 1.0) -> float:
    """Bytes read and written on one device in one run; `often` as in `hlo.walk`."""
    fused = {
        name
        for body in module.computations.values()
        for one in body
        if one.opcode == "fusion"
        for name in hlo.called(one).get("calls", [])
    }
    home: dict[int, Shapes] = {}
    for name, body in module.computations.items():
        shapes = {one.name: one.shape for one in body}
        home |= {} if name in fused else {id(one): shapes for one in body}
    total = [0.0]

    def visit(one: Instruction, times: float) -> None:
        if id(one) in home:
            total[0] += times * cost(module, home[id(one)], one)

    price = lambda one: cost(module, home[id(one)], one) if id(one) in home else 0.0
    hlo.walk(module, visit, price, often)
    return total[0]


def cost(module: Module, shapes: Shapes, one: Instruction) -> float:
    """Bytes that one instruction reads and writes."""
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    names = operands(one)
    if one.opcode in SLICES:
        return 2 * size(one.shape)
    if one.opcode == "dynamic-update-slice":
        return 2 * size(shapes.get(names[1], "")) if len(names) > 1 else 0.0
    if one.opcode != "fusion":
        return size(one.shape) + sum(size(shapes.get(name, "")) for name in names)
    body = module.computations.get(hlo.called(one).get("calls", [""])[0], ())
    read = sum(taken(body, i, shapes.get(name, "")) for i, name in enumerate(names))
    return read + written(body, one.shape)


def taken(body: tuple[Instruction, ...], index: int, shape: str) -> float:
    """Bytes that a fusion reads of its operand `index`."""
    name = next((i.name for i in body if i.opcode == "parameter" and i.rest.startswith(f"{index})")), None)
    users = [one for one in body if name is not None and name in operands(one)]
    if not users or not all(_partial(one, name) for one in users):
        return size(shape)
    return min(size(shape), sum(size(one.shape) for one in users if one.opcode in SLICES))


def _partial(one: Instruction, name: str | None) -> bool:
    """Whether an instruction touches only a part of its first operand."""
    return one.opcode in (*SLICES, "dynamic-update-slice") and operands(one)[:1] == [name]


def written(body: tuple[Instruction, ...], shape: str) -> float:
    """Bytes that a fusion writes: only what is new, where it writes into an operand."""
    inside = {one.name: one.shape for one in body}
    root = body[-1] if body else None
    if root is not None and root.opcode == "dynamic-update-slice":
        return size(inside.get(operands(root)[1], shape))
    return size(shape)


def operands(one: Instruction) -> list[str]:
    """Names of the operands."""
    return re.findall(r"%([\w.\-]+)", one.rest[: hlo.closing("(" + one.rest, 0)])


def size(shape: str) -> float:
    """Bytes of the parts of a shape that lie in the device's memory."""
    return sum(hlo.bytes_of(part) for part in PLACED.findall(shape) if "S(" not in part or "S(0)" in part)
