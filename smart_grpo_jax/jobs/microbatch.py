"""How many at once: `memory.* = auto`, `search.chunk = auto` and `mesh.fsdp = auto`, solved from a footprint.

A phase may use what a device has, less RESERVE, less what lies there anyway; its line (footprint.py) turned
around gives the rows. Images lie over ways = data × fsdp devices, so that every number is a multiple of
that, or all at once. What is asked for as a number stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs.footprint import Footprint
from smart_grpo_jax.policy import pieces
from smart_grpo_jax.runtime.mesh import filled
from smart_grpo_jax.runtime.topologies import GIB

RESERVE = 0.1
"""Share of a device that is left to the error of the estimate and to fragmentation. The estimate of an update
is 7 to 22 % above what the compiler takes (SD3.5-L and FLUX on v5e), so that a mesh is refused only where the
estimate exceeds the device by as much."""

AT_REST = 0.5
"""Share of a device that parameters and state may take before they are spread over `fsdp`."""

PHASES: Mapping[str, tuple[str, ...]] = {
    "rollout": ("rollout", "decode", "reward", "chunk"),
    "evaluate": ("rollout", "decode", "reward", "chunk"),
    "update": ("train",),
}
"""Which numbers decide over the memory of a program."""

Numbers = Mapping[str, int]
"""rollout (groups), decode, reward (images), chunk, train (states): as in the config, 0 is all at once."""


class Place(NamedTuple):
    """Devices of one copy of the parameters, devices that images lie over, and bytes of one device."""

    parts: int
    ways: int
    limit: float


class Rows(NamedTuple):
    """What one device works on in a call of each kind."""

    velocity: int
    searched: int
    decode: int
    reward: int
    gradient: int


def numbers_of(config: Config) -> dict[str, int]:
    """The numbers of a config."""
    m = config.memory
    return {
        "rollout": m.rollout,
        "decode": m.decode,
        "reward": m.reward,
        "train": m.train,
        "chunk": config.search.chunk,
    }


def with_numbers(config: Config, numbers: Numbers) -> Config:
    """The config with these numbers."""
    memory = {name: value for name, value in numbers.items() if name != "chunk"}
    return dataclasses.replace(
        config,
        memory=dataclasses.replace(config.memory, **memory),
        search=dataclasses.replace(config.search, chunk=numbers["chunk"]),
    )


def automatic(config: Config) -> bool:
    """Whether anything is left to us."""
    return config.mesh.fsdp < 1 or min(numbers_of(config).values()) < 0


def place(config: Config, devices: int, limit: float) -> Place:
    """Where the images and the parameters of a settled config lie."""
    parts = config.mesh.fsdp * config.mesh.tensor
    if devices % parts:
        raise UserError(
            f"mesh.fsdp: got {config.mesh.fsdp} × mesh.tensor {config.mesh.tensor}, want a divisor of "
            f"{devices} devices"
        )
    return Place(parts, devices // config.mesh.tensor, limit)


def settle(config: Config, f: Footprint | None, devices: int, limit: float | None) -> tuple[Config, str]:
    """The config with nothing left automatic, and why the mesh is what it is. Where nobody knows what a
    device holds, everything is done at once, whole on each device."""
    why, fsdp = "as given", config.mesh.fsdp
    known = f is not None and limit is not None
    if fsdp < 1:
        fsdp, why = 1, "nobody knows what a device holds"
        if f is not None and limit is not None:
            if devices % config.mesh.tensor:
                raise UserError(f"mesh.tensor: got {config.mesh.tensor}, want a divisor of {devices} devices")
            of = Place(config.mesh.tensor, devices // config.mesh.tensor, limit)
            fsdp, why = choose_parts(f, of, numbers_of(config))
        data = 0 if known else config.mesh.data
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=data, fsdp=fsdp))
    given = numbers_of(config)
    if f is None or limit is None:
        return with_numbers(config, {name: max(0, value) for name, value in given.items()}), why
    return with_numbers(config, solve(f, place(config, devices, limit), given)), why


def trial(config: Config, devices: int) -> Config:
    """The config at once, on a mesh that shows which parameters would be spread, with some searched steps:
    only looked at."""
    made, _ = settle(config, None, devices, None)
    steps = "late" if made.search.steps == "auto" else made.search.steps
    made = dataclasses.replace(made, search=dataclasses.replace(made.search, steps=steps))
    if config.mesh.fsdp >= 1 or devices % config.mesh.tensor:
        return made
    fsdp = math.gcd(8, devices // config.mesh.tensor)
    return dataclasses.replace(made, mesh=dataclasses.replace(made.mesh, data=0, fsdp=fsdp))


def solve(f: Footprint, place: Place, given: Numbers) -> dict[str, int]:
    """The numbers, those that are auto (< 0) as large as the device allows and at least one row on each."""
    room = (1 - RESERVE) * place.limit
    acting, learning = room - standing(f, place, "rollout"), room - standing(f, place, "update")
    groups = given["rollout"]
    if groups < 0:
        most = f.velocity.rows(acting)
        fitting = [g for g in divisors(f.groups) if call_rows(f, place, g) <= most]
        groups = max(fitting, default=1)
    called = groups or f.groups
    images = place.ways * call_rows(f, place, called)
    searched = math.ceil(called * f.searched / place.ways)
    tried = pieces.even(max(1, searched), f.velocity.rows(acting) // max(1, f.candidates))
    chunk = min(place.ways * tried, called * f.searched)
    states = f.states * place.ways * max(1, f.gradient.rows(learning) // f.states)
    judged = max(images, chunk * f.candidates)
    solved = {
        "rollout": groups,
        "decode": place.ways * pieces.even(call_rows(f, place, called), f.decode.rows(acting)),
        "reward": min(judged, place.ways * max(1, f.reward.rows(acting))),
        "chunk": chunk,
        "train": min(states, f.images // f.updates * f.states),
    }
    return {name: value if given[name] < 0 else given[name] for name, value in solved.items()}


def peaks(f: Footprint, place: Place, numbers: Numbers) -> dict[str, float]:
    """Bytes on a device in each phase, what lies beside the program included."""
    r = rows(f, place, numbers)
    acting = max(f.velocity.at(r.velocity), f.decode.at(r.decode), f.reward.at(r.reward))
    if f.searched:
        # candidates are decoded and judged in pieces of the smaller of the two numbers
        seen = min(r.searched, r.decode, r.reward)
        acting = max(acting, f.velocity.at(r.searched), f.decode.at(seen), f.reward.at(seen))
    return {
        "rollout": standing(f, place, "rollout") + acting,
        "update": standing(f, place, "update") + f.gradient.at(r.gradient),
    }


def standing(f: Footprint, place: Place, phase: str) -> float:
    """What lies on a device all the time: parameters, state, the images of the epoch; gradients twice while
    they are summed."""
    rest = f.frozen.on(place.parts) + f.state.on(place.parts) + f.fixed.on(place.parts)
    paths = f.path * math.ceil(f.images / place.ways)
    return rest + paths + (2 * f.learned.on(place.parts) if phase == "update" else 0.0)


def rows(f: Footprint, place: Place, numbers: Numbers) -> Rows:
    """What each device works on with these numbers."""
    groups = numbers["rollout"] or f.groups
    images, each = call_rows(f, place, groups), place.ways
    piece = lambda chunk, most: pieces.even(most, chunk // each) if chunk else most
    states = math.ceil(groups * f.searched / each)
    samples = math.ceil(f.images / f.updates / each)
    train = numbers["train"]
    return Rows(
        velocity=images,
        searched=piece(numbers["chunk"], states) * f.candidates,
        decode=piece(numbers["decode"], images),
        reward=piece(numbers["reward"], images),
        gradient=f.states * (piece(max(1, train // f.states), samples) if train else samples),
    )


def call_rows(f: Footprint, place: Place, groups: int) -> int:
    """Images on a device in a rollout call of so many groups, filled up until they divide; where the call is
    the epoch, until those of each optimizer step do."""
    parts = place.ways * (f.updates if groups == f.groups else 1)
    return filled(groups, f.members, parts) * f.members // place.ways


def divisors(n: int) -> list[int]:
    """All of them, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def halved(numbers: Numbers, names: Sequence[str], groups: int, ways: int) -> dict[str, int]:
    """The next smaller numbers of a phase; the same ones where there is nothing left to halve."""
    smaller = dict(numbers)
    for name in names:
        if name == "rollout":
            fitting = [g for g in divisors(groups) if 2 * g <= (numbers[name] or groups)]
            smaller[name] = max(fitting, default=1)
        elif numbers[name] > ways:
            smaller[name] = max(ways, numbers[name] // 2 // ways * ways)
    return smaller


def choose_parts(f: Footprint, place: Place, given: Numbers) -> tuple[int, str]:
    """The fewest devices of a copy that keep parameters and state under AT_REST of a device and leave room
    for the smallest pieces; all of them where none does. `place.parts` is the share of `mesh.tensor`."""
    held, limit = (f.frozen, f.state, f.fixed), place.limit
    at = lambda parts: place._replace(parts=parts * place.parts)
    size = lambda parts: sum(one.on(parts * place.parts) for one in held)
    most = lambda parts: max(peaks(f, at(parts), solve(f, at(parts), given)).values())
    known = divisors(place.ways)
    resting = [parts for parts in known if size(parts) <= AT_REST * limit] or known[-1:]
    parts = next((parts for parts in resting if most(parts) <= (1 + RESERVE) * limit), known[-1])
    told = f"parameters and state take {size(parts) / GIB:.1f} of {limit / GIB:.1f} GiB on a device"
    if parts == 1:
        return parts, f"{told}, whole"
    before = known[known.index(parts) - 1]
    if before not in resting:
        return parts, f"{told}; with fsdp {before} it were {size(before) / GIB:.1f}"
    return parts, f"{told}; with fsdp {before} a phase needs about {most(before) / GIB:.1f}"


def words(numbers: Numbers, searched: bool) -> str:
    """The numbers for a person."""
    of = lambda value, unit: f"{value or 'all'} {unit}"
    parts = [
        of(numbers["rollout"], "groups per rollout"),
        of(numbers["decode"], "per decode"),
        of(numbers["reward"], "per reward"),
        *([of(numbers["chunk"], "states searched")] if searched else []),
        of(numbers["train"], "states per gradient"),
    ]
    return ", ".join(parts)
