"""Bytes that a function's intermediate results take at once, from its jaxpr, without compiling it.

Results appear and die in the order of the program. Elementwise results take the place of an operand that
dies; those that are larger than what they are made of (broadcasts, wider types) are made again where they
are read, as a compiler that fuses does. The arguments are not counted; the slice of a scan's inputs is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from smart_grpo_jax.maths.flops import bodies, repeats

FUSED = frozenset(
    """abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp convert_element_type copy cos div eq
    erf erf_inv exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p logistic
    lt max min mul ne neg not optimization_barrier or pow real reduce_precision rem reshape round rsqrt
    select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin slice
    split sqrt square squeeze stop_gradient sub tanh transpose xor""".split()
)
"""What becomes part of its reader or is written over its operand."""


def peak(fn: Callable[..., Any], *args: Any) -> float:
    """The most bytes that lie in memory at once beside the arguments; these may be `ShapeDtypeStruct`s."""
    return _peak(jax.make_jaxpr(fn)(*args).jaxpr, ())


def per_row(fn: Callable[[int], float], rows: int) -> tuple[float, float]:
    """(base, slope) of a count that is a straight line in the rows of a batch, from `rows` and twice that."""
    one, two = fn(rows), fn(2 * rows)
    slope = max(0.0, (two - one) / rows)
    return max(0.0, one - slope * rows), slope


def _bytes(variable: Any) -> float:
    aval = variable.aval
    if not hasattr(aval, "shape") or not hasattr(aval, "dtype"):
        return 0.0
    return float(math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [a for a in atoms if not hasattr(a, "val")]


def _peak(jaxpr: Any, counted: Sequence[Any]) -> float:
    """The peak of one body; `counted` of its inputs belong to it."""
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last |= dict.fromkeys(_variables(eqn.invars), i)
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    made = _Memory({v: _bytes(v) for v in counted}, last)
    for i, eqn in enumerate(jaxpr.eqns):
        made.step(i, eqn)
    return made.highest


class _Memory:
    """What lies there while the equations of one body run."""

    def __init__(self, sizes: dict[Any, float], last: dict[Any, int]) -> None:
        self.sizes, self.last = sizes, last
        self.roots: dict[Any, frozenset[Any]] = {}
        self.dies: dict[Any, int] = {v: last.get(v, -1) for v in sizes}
        self.lies = self.highest = sum(sizes.values())

    def origin(self, v: Any) -> frozenset[Any]:
        """The results that must be there so that `v` can be read."""
        return self.roots.get(v, frozenset((v,)))

    def step(self, i: int, eqn: Any) -> None:
        """Run one equation: make its results, and forget what nobody will read."""
        fused = eqn.primitive.name in FUSED
        operands = frozenset(r for v in _variables(eqn.invars) for r in self.origin(v) if r in self.sizes)
        made = [v for v in eqn.outvars if v in self.last]
        if fused and sum(map(_bytes, made)) > sum(self.sizes[r] for r in operands):
            for v in made:  # made again where it is read
                self.roots[v] = operands
                self.keep(operands, self.last[v])
        else:
            if not fused:
                self.highest = max(self.highest, self.lies + _inside(eqn))
            self.lies += sum(map(_bytes, made)) if not fused else 0.0
            self.highest = max(self.highest, self.lies)
            for v in made:
                self.sizes[v] = _bytes(v)
                self.dies[v] = self.last[v]
        self.forget(i, fused, made)

    def keep(self, operands: frozenset[Any], until: int) -> None:
        """Operands of a result that is made again live as long as it does."""
        for r in operands:
            self.dies[r] = max(self.dies[r], until)

    def forget(self, i: int, fused: bool, made: Sequence[Any]) -> None:
        """Free what dies here; a fused result has then taken its place."""
        for r in [r for r, end in self.dies.items() if end <= i]:
            self.lies -= self.sizes.pop(r)
            del self.dies[r]
        if fused:
            self.lies += sum(self.sizes[v] for v in made if v in self.sizes)
            self.highest = max(self.highest, self.lies)


def _inside(eqn: Any) -> float:
    """What the bodies of an equation need while they run: those of the costliest, on all shards together."""
    name = eqn.primitive.name
    if name == "pallas_call":
        return 0.0
    every = [body for value in eqn.params.values() for body in bodies(value)]
    if name == "scan":
        fixed = eqn.params["num_consts"]
        stacked = eqn.outvars[eqn.params["num_carry"] :]
        return _peak(every[0], every[0].invars[fixed:]) + sum(map(_bytes, stacked))
    shards = repeats(eqn) if name == "shard_map" else 1
    return shards * max((_peak(body, ()) for body in every), default=0.0)
