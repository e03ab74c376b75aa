"""What a run puts on a device, counted and not compiled: parameters at rest, and straight lines in the rows
of a batch for everything else.

    bytes(rows) = base + slope × rows        rows: images or states that one device works on

The lines are read from the jaxprs of the networks (maths/liveness.py), so they know the model, the remat
policy and the attention that is used; CALIBRATED is what the compiler made of a line, in this project's
own compilations. An estimate: where it must be right, the plan compiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.contradictions import LIKELIHOOD
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import traced
from smart_grpo_jax.jobs.plan_programs import Paper
from smart_grpo_jax.maths import liveness
from smart_grpo_jax.runtime.mesh import ways_of

CALIBRATED: Mapping[str, float] = {"velocity": 1.25, "gradient": 1.25, "decode": 1.4, "reward": 1.25}
"""Compiled over counted bytes, rounded up so that few phases must be compiled again; a plan's JSON shows how
good it is (`estimated_bytes` beside `total_bytes`)."""


class Line(NamedTuple):
    """Bytes on a device as a function of the rows that it works on."""

    base: float
    slope: float

    def at(self, rows: float) -> float:
        """The line at so many rows."""
        return self.base + self.slope * rows

    def rows(self, room: float) -> int:
        """The most rows in so much room."""
        return max(0, math.floor((room - self.base) / max(self.slope, 1.0)))


class Held(NamedTuple):
    """Bytes of parameters: those that every device holds whole, and those that lie in parts."""

    whole: float
    split: float

    def on(self, parts: int) -> float:
        """Bytes on a device where `parts` devices share a copy."""
        return self.whole + self.split / parts


@dataclasses.dataclass(frozen=True)
class Footprint:
    """All that the solver needs to know of a config; `path` is what an image of an epoch leaves behind."""

    frozen: Held
    learned: Held
    state: Held
    fixed: Held
    path: float
    velocity: Line
    gradient: Line
    decode: Line
    reward: Line
    groups: int
    members: int
    searched: int
    candidates: int
    states: int
    updates: int

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return self.groups * self.members

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Footprint:
        """The inverse of `as_dict`."""
        kinds: dict[str, Any] = dict.fromkeys(("frozen", "learned", "state", "fixed"), Held)
        kinds |= dict.fromkeys(("velocity", "gradient", "decode", "reward"), Line)
        values: dict[str, Any] = {k: kinds[k](*v) if k in kinds else v for k, v in found.items()}
        return Footprint(**values)


def of(p: Paper) -> Footprint:
    """The footprint of a config on paper; traces each network twice."""
    config = p.config
    trained = traced.credit_masks(config, p.times, 0, np.ones(config.prompts.groups, bool)).trained
    likelihood = config.train.loss in LIKELIHOOD
    return Footprint(
        frozen=held(p.frozen),
        learned=held(p.state.params),
        state=held(p.state),
        fixed=held(p.fixed),
        path=path_bytes(p),
        **lines(p),
        groups=config.prompts.groups,
        members=config.prompts.members,
        searched=p.shape.searched_members,
        candidates=config.search.candidates,
        states=len(trained) if likelihood else 1,
        updates=config.train.updates_per_epoch,
    )


def distinct(tree: PyTree) -> list[Any]:
    """The leaves; one that stands there twice lies on the device once."""
    return list({id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def held(tree: PyTree) -> Held:
    """Bytes of a tree of shapes, by where its leaves lie."""
    sums = [0.0, 0.0]
    for leaf in distinct(tree):
        spec = getattr(getattr(leaf, "sharding", None), "spec", ())
        split = any(axis in ("fsdp", "tensor") for entry in spec for axis in _axes(entry))
        sums[split] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return Held(*sums)


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def path_bytes(p: Paper) -> float:
    """Three latents per step, the finished one, and the image, all in float32."""
    latent, image = math.prod(p.shape.latent), math.prod(image_shape(p))
    return 4.0 * (latent * (3 * p.shape.stop + 1) + image)


def image_shape(p: Paper) -> tuple[int, ...]:
    """[H, W, 3] of a picture."""
    x = jax.ShapeDtypeStruct((1, *p.shape.latent), jnp.float32)
    return jax.eval_shape(p.fns.decode, p.fixed["decoder"], x).shape[1:]


def lines(p: Paper) -> dict[str, Line]:
    """Of the guided network forward and backward, of the decoder and of the rewards."""
    ways = ways_of(p.mesh)
    side = image_shape(p)
    text = prompt_data.load(p.config.prompts.source, p.config.prompts.strict).prompts[0]
    row = p.conditioning(1)
    cond = 4.0 * sum(math.prod(a.shape) for a in jax.tree.leaves(row))
    params = p.policy.bind(p.frozen, p.state.params)
    x = lambda n: jax.ShapeDtypeStruct((n, *p.shape.latent), jnp.float32)
    t = lambda n: jax.ShapeDtypeStruct((n,), jnp.float32)

    def forward(n: int) -> float:
        return liveness.peak(p.fns.velocity, params, x(n), t(n), p.conditioning(n))

    def backward(n: int) -> float:
        velocity = p.policy.velocity if p.config.train.loss in LIKELIHOOD else p.policy.raw_velocity
        loss = lambda learned, frozen, *rest: (velocity(p.policy.bind(frozen, learned), *rest) ** 2).sum()
        return liveness.peak(jax.grad(loss), p.state.params, p.frozen, x(n), t(n), p.conditioning(n))

    def decoded(n: int) -> float:
        return liveness.peak(p.fns.decode, p.fixed["decoder"], x(n))

    def judged(which: Any, score: Any, name: str, n: int) -> float:
        images = jax.ShapeDtypeStruct((n, *side), jnp.float32)
        ctx = which.prepare([text] * n)
        return liveness.peak(lambda *a: score(*a, None), p.fixed[name], images, ctx)

    train = _line("reward", partial(judged, p.judged.training, p.fns.score, "reward"), ways)
    search = train
    if p.shape.searched_members and p.judged.search is not p.judged.training:
        ask = partial(judged, p.judged.search, p.fns.search_score, "search_reward")
        search = _line("reward", ask, ways)
    return {
        "velocity": _line("velocity", forward, ways, cond),
        "gradient": _line("gradient", backward, ways, cond),
        "decode": _line("decode", decoded, ways, 4.0 * math.prod(side)),
        "reward": Line(max(train.base, search.base), max(train.slope, search.slope)),
    }


def _line(kind: str, count: Callable[[int], float], ways: int, more: float = 0.0) -> Line:
    """The calibrated line of a count in rows on a device, with `more` bytes of arguments per row."""
    base, slope = liveness.per_row(count, ways)
    return Line(CALIBRATED[kind] * base, CALIBRATED[kind] * slope + more)
