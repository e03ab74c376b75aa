"""The command line: a table of flags, and `--config.a.b=value` for every field of the config.

absl's and ml_collections' own parsers answer a mistake with a traceback; here it is one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence

from smart_grpo_jax.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Flags:
    """What was asked for."""

    config: str | None = None
    workdir: str | None = None
    mode: str = "train"
    prompts: str | None = None
    seed: int = 0
    seeds: int | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    lora: str | None = None
    weights: str | None = None
    format: str | None = None
    batch: int = 8
    epoch: int | None = None
    out: str | None = None
    examples: str = ""
    topology: str | None = None
    json: str = ""
    sweep: str = ""
    profile: int | None = None
    against: str | None = None
    costs: str | None = None
    reference: str | None = None
    expect: str | None = None
    results: str | None = None
    arms: str | None = None
    runs: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    help: bool = False
    overrides: tuple[tuple[str, str], ...] = ()


SWITCHES = {
    "check": "rewards", "bench": "rewards", "audit": "rewards", "exact": "plan", "dry-run": "experiment",
}  # fmt: skip
"""Flags without a value, and the mode that they belong to."""
OF_A_MODE = {
    **SWITCHES, "profile": "train", "sweep": "plan", "topology": "plan", "json": "plan",
    "against": "compare", "reference": "compare", "expect": "compare",
    "results": "compare or experiment", "arms": "experiment",
}  # fmt: skip
WORDY = "compare"
"""The mode whose arguments are words: run folders."""
BARE = {"profile": "0"}
"""Flags that may stand without a value, and the value that they then have."""
WHOLE = ("seed", "seeds", "steps", "batch", "epoch", "profile")
NUMBERS = ("guidance",)
CHOICES = {"weights": ("ema", "raw"), "format": ("lora", "full", "orbax", "all")}
NAMES = (
    "config", "workdir", "mode", "prompts", "size", "lora", "weights", "format", "out", "examples",
    "topology", "json", "sweep", "against", "costs", "reference", "expect", "results", "arms",
    *WHOLE, *NUMBERS,
)  # fmt: skip


def parse(argv: Sequence[str], modes: Iterable[str]) -> Flags:
    """Flags from `--name=value` or `--name value`; unknown ones name the nearest known."""
    values: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    switches: list[str] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help", "help"):
            return Flags(help=True)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, given, value = word[2:].partition("=")
        if name in BARE:
            value = _counted(name, value) if given else BARE[name]
        elif not given and name not in SWITCHES:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}: has no value, wanted --{name}=VALUE")
            value = rest.pop(0)
        if name in SWITCHES:
            switches.append(_switch(name, value))
        elif name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        elif name in NAMES:
            values[name] = value
        else:
            raise UserError(f"--{name}: no such flag ({nearest(name, (*NAMES, *SWITCHES))})")
    bound = [name for name in (*switches, *values) if name in OF_A_MODE]
    _check_mode(values.get("mode", "train"), modes, bound, words)
    for name, known in CHOICES.items():
        if name in values and values[name] not in known:
            raise UserError(f'--{name}: got "{values[name]}" ({nearest(values[name], known)})')
    numbers: dict[str, float] = {name: _whole(name, values.pop(name)) for name in WHOLE if name in values}
    numbers |= {name: _number(name, values.pop(name)) for name in NUMBERS if name in values}
    lists = {"switches": tuple(switches), "overrides": tuple(overrides), "runs": tuple(words)}
    return Flags(**values, **numbers, **lists)  # type: ignore[arg-type]


def _check_mode(mode: str, modes: Iterable[str], switches: Sequence[str], words: Sequence[str]) -> None:
    if words and mode != WORDY:
        raise UserError(f'command line: got "{words[0]}", wanted --flag=value (see --help)')
    if mode not in modes:
        raise UserError(f'--mode: got "{mode}" ({nearest(mode, modes)})')
    for switch in switches:
        if mode not in OF_A_MODE[switch].split(" or "):
            raise UserError(f"--{switch}: got --mode={mode}, wanted --mode={OF_A_MODE[switch]}")


def _switch(name: str, value: str) -> str:
    if value:
        raise UserError(f'--{name}: got "{value}", wanted no value')
    return name


def _counted(name: str, text: str) -> str:
    if not text.isdigit() or not int(text):
        raise UserError(f'--{name}: got "{text}", wanted a number of an epoch, or no value at all')
    return text


def _whole(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f'--{name}: got "{text}", wanted a whole number ≥ 0')
    return int(text)


def _number(name: str, text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise UserError(f'--{name}: got "{text}", wanted a number')
