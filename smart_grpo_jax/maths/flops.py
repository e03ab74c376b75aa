"""Counts the floating-point operations of a function from its jaxpr, without compiling it.

XLA's own count takes a scan body once whatever its length, loses sharded matmuls and sees nothing of
Pallas kernels. Here matrix products and convolutions are counted, two operations per multiply-add,
and everything else as nothing: it is below a percent in these networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Tally(NamedTuple):
    """`flops` of one call on all devices together; `while_loops` were counted as one pass each."""

    flops: float
    while_loops: int


def count(fn: Callable, *args: Any, often: float = 1.0) -> float:
    """The operations of fn(*args); arguments may be `jax.ShapeDtypeStruct`s. `often` is the share of times
    that a conditional takes its dearest branch; else it takes the cheapest."""
    return tally(fn, *args, often=often).flops


def tally(fn: Callable, *args: Any, often: float = 1.0) -> Tally:
    """As `count`, with the number of loops whose length the program does not tell."""
    return _jaxpr(jax.make_jaxpr(fn)(*args).jaxpr, often)


def _dot_general(eqn) -> float:
    """2 * (size of the output) * (size of the contracted dimensions)."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)


def _conv(eqn) -> float:
    """2 * (size of the output) * (window * input channels of a group); zeros put in between the inputs
    of a transposed convolution are not multiplied."""
    kernel = eqn.invars[1].aval.shape
    out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) / out_features
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * taps / math.prod(eqn.params["lhs_dilation"])


PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _conv}


def repeats(eqn) -> int:
    """How often the body of an equation runs: steps of a scan, shards of a shard_map, cells of a kernel."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params.get("newly_manual_axes", mesh.axis_names))
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    return 1


def bodies(value: Any) -> Iterator[Any]:
    """The jaxprs inside a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from bodies(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr


def _jaxpr(jaxpr, often: float) -> Tally:
    flops, loops = 0.0, 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in PRODUCTS:
            flops += PRODUCTS[name](eqn)
            continue
        inside = 1.0 if name == "pallas_call" else often  # a kernel's conditions are its own
        inner = [_jaxpr(body, inside) for value in eqn.params.values() for body in bodies(value)]
        loops += sum(body.while_loops for body in inner) + (name == "while")
        if name == "cond":
            cheapest, *_, dearest = sorted(body.flops for body in inner)
            flops += often * dearest + (1 - often) * cheapest
        else:
            flops += repeats(eqn) * sum(body.flops for body in inner)
    return Tally(flops, loops)
