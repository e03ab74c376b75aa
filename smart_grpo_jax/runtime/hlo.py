"""What a compiled program sends between devices, and its largest buffers, read from its HLO text.

XLA's own counts take the body of a loop once. Here every instruction counts as often as it runs: a loop's
length is what the compiler noted, or the constant that its condition compares with. Of a conditional's
branches the costliest counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BYTES: Mapping[str, float] = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
    "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
END = re.compile(r"^\}(, execution_thread=.*)?$")
"""The last line of a computation; a kernel's metadata may also have lines that begin with a bracket."""


class Instruction(NamedTuple):
    """One line: `shape` and `rest` are text, `rest` begins with the operands."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def op_name(self) -> str:
        """What the program calls it, the jit's own prefix left out."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return re.sub(r"^jit\([^)]*\)/", "", found[1]) if found else self.name


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, and the one that is run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


def bytes_of(shape: str) -> float:
    """Bytes of a shape, or of all parts of a tuple."""
    parts = (BYTES.get(kind, 0) * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in
             SHAPE.findall(shape))  # fmt: skip
    return float(sum(parts))


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif END.match(line):
            current = None
        elif current is not None and (found := instruction(line)):
            current.append(found)
        elif current:  # the attributes of a kernel go on over several lines
            current[-1] = current[-1]._replace(rest=f"{current[-1].rest} {line}")
    return Module({name: tuple(body) for name, body in computations.items()}, entry)


def instruction(line: str) -> Instruction | None:
    """One instruction of a line; None for anything else."""
    found = INSTRUCTION.match(line)
    if not found:
        return None
    body = found[2]
    end = closing(body, 0) + 1 if body.startswith("(") else (body.find(" ") if " " in body else 0)
    opcode = re.match(r"\s*([\w\-]+)\(", body[end:])
    return Instruction(found[1], body[:end], opcode[1], body[end + opcode.end() :]) if opcode else None


def closing(text: str, start: int) -> int:
    """Where the bracket at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def called(one: Instruction) -> dict[str, list[str]]:
    """The computations that an instruction runs, by role."""
    found: dict[str, list[str]] = {}
    for role, many, single in re.findall(
        r"\b(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)="
        r"(?:\{([^}]*)\}|%?([\w.\-]+))",
        one.rest,
    ):
        found[role] = [name.strip().lstrip("%") for name in many.split(",")] if many else [single]
    return found


def trips(module: Module, one: Instruction, roles: Mapping[str, list[str]]) -> int:
    """How often a loop runs; 1 where nothing says so."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest):
        return int(known[1])
    condition = roles["condition"][0]
    body = module.computations.get(condition, ())
    bounds = [int(m[1]) for i in body if i.opcode == "constant" and (m := re.match(r"(\d+)\)", i.rest))]
    return max(bounds) if bounds else 1


Visit = Callable[[Instruction, float], None]


def walk(module: Module, visit: Visit, cost: Callable[[Instruction], float], often: float = 1.0) -> None:
    """`visit(instruction, times)` for everything that runs. A conditional takes the branch of the highest
    `cost` in the share `often` of its runs, else that of the lowest."""

    def total(name: str) -> float:
        found = [0.0]

        def add(one: Instruction, times: float) -> None:
            found[0] += times * cost(one)

        run(name, 1.0, add)
        return found[0]

    def run(name: str, times: float, visit: Visit) -> None:
        for one in module.computations.get(name, ()):
            visit(one, times)
            roles = called(one)
            if one.opcode == "while":
                run(roles["body"][0], times * trips(module, one, roles), visit)
            elif one.opcode == "conditional":
                branches = [b for role in roles.values() for b in role]
                for choose, share in ((max, often), (min, 1 - often)):
                    if share > 0:
                        run(choose(branches, key=total), times * share, visit)
            elif one.opcode in ("call", "async-start", "fusion"):
                for inner in roles.get("calls", []) + roles.get("to_apply", []):
                    run(inner, times, visit)

    run(module.entry, 1.0, visit)


COLLECTIVES: Mapping[str, Callable[[float, int], float]] = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}
"""Bytes that a device sends in a ring of n, from the bytes of the result on that device."""


class Collective(NamedTuple):
    """One kind of traffic: bytes that a device sends in all, over which mesh axes, how often, for what."""

    kind: str
    axes: tuple[str, ...]
    sent: float
    times: float
    op_name: str
    shape: str


def kind_of(opcode: str) -> str | None:
    """The collective that an opcode is or begins; None for the end of one, which is not counted twice."""
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def collectives(module: Module, mesh: Mapping[str, int], often: float = 1.0) -> list[Collective]:
    """All traffic of a program over a mesh, the largest first; `often` as in `walk`."""
    found: list[Collective] = []

    def sent(one: Instruction) -> float:
        kind = kind_of(one.opcode)
        if kind is None:
            return 0.0
        members = group(one.rest, math.prod(mesh.values()))
        size = bytes_of(one.shape)
        if one.opcode == "all-gather-start":
            size = max(bytes_of(part) for part in re.findall(r"\w+\[[\d,]*\]", one.shape))
        return COLLECTIVES[kind](size, max(1, len(members))) if len(members) > 1 else 0.0

    def visit(one: Instruction, times: float) -> None:
        if (kind := kind_of(one.opcode)) and (each := sent(one)):
            axes = axes_of(group(one.rest, math.prod(mesh.values())), mesh)
            found.append(Collective(kind, axes, times * each, times, one.op_name, one.shape))

    walk(module, visit, sent, often)
    return sorted(found, key=lambda one: -one.sent)


def group(rest: str, devices: int) -> list[int]:
    """The devices of the first group of a collective."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return [int(pairs[1]), int(pairs[2])]
    if named := MESH_GROUPS.search(rest):
        return mesh_group(*named.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims = [int(d) for d in iota[2].split(",")]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(d) for d in iota[3].split(",")])
        return ids.reshape([int(d) for d in iota[1].split(",")])[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return [int(d) for d in listed[1].split(",")]
    return list(range(devices))


MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)


def mesh_group(sizes: str, dims: str | None, turned: str | None, used: str) -> list[int]:
    """The first group of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`; the order of the devices is
    left out where it is the natural one."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(axes.values()))
    if dims:
        ids = ids.reshape([int(d) for d in dims.split(",")])
        ids = ids.transpose([int(d) for d in turned.split(",")]) if turned else ids
    ids = ids.reshape(list(axes.values()))
    names = re.findall(r"'([^']+)'", used)
    index = tuple(slice(None) if name in names else 0 for name in axes)
    return np.asarray(ids[index]).ravel().tolist()


def axes_of(members: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.stack(np.unravel_index(np.asarray(members), tuple(mesh.values())))
    return tuple(name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1)


class Buffer(NamedTuple):
    """A large result: its bytes on one device, what makes it, and its shape."""

    size: float
    op_name: str
    shape: str


def buffers(module: Module, count: int = 10) -> list[Buffer]:
    """The largest results outside fusions, one per operation of the program."""
    inside = {
        name
        for body in module.computations.values()
        for one in body
        if one.opcode == "fusion"
        for name in called(one).get("calls", [])
    }
    largest: dict[str, Buffer] = {}
    for name, body in module.computations.items():
        if name in inside:
            continue
        for one in body:
            if one.opcode in ("parameter", "tuple", "get-tuple-element", "while", "conditional", "bitcast"):
                continue
            size = bytes_of(one.shape)
            if size > largest.get(one.op_name, Buffer(0, "", "")).size:
                largest[one.op_name] = Buffer(size, one.op_name, re.sub(r"\{[^}]*\}", "", one.shape))
    return sorted(largest.values(), key=lambda one: -one.size)[:count]
