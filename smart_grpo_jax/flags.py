"""The command line: a table of flags, and `--config.a.b=value` for every field of the config.

absl's and ml_collections' own parsers answer a mistake with a traceback; here it is one line.
"""

from __future__ import annotations

import dataclasses
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
    epoch: int | None = None
    out: str | None = None
    help: bool = False
    overrides: tuple[tuple[str, str], ...] = ()


NAMES = ("config", "workdir", "mode", "prompts", "seed", "epoch", "out")
WHOLE = ("seed", "epoch")


def parse(argv: Sequence[str], modes: Iterable[str]) -> Flags:
    """Flags from `--name=value` or `--name value`; unknown ones name the nearest known."""
    values: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help", "help"):
            return Flags(help=True)
        if not word.startswith("--"):
            raise UserError(f'command line: got "{word}", wanted --flag=value (see --help)')
        name, given, value = word[2:].partition("=")
        if not given:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}: has no value, wanted --{name}=VALUE")
            value = rest.pop(0)
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        elif name in NAMES:
            values[name] = value
        else:
            raise UserError(f"--{name}: no such flag ({nearest(name, NAMES)})")
    mode = values.get("mode", "train")
    if mode not in modes:
        raise UserError(f'--mode: got "{mode}" ({nearest(mode, modes)})')
    numbers = {name: _whole(name, values.pop(name)) for name in WHOLE if name in values}
    return Flags(**values, **numbers, overrides=tuple(overrides))  # type: ignore[arg-type]


def _whole(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f'--{name}: got "{text}", wanted a whole number ≥ 0')
    return int(text)
