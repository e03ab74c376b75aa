"""Published config files (diffusers, transformers) read into frozen dataclasses.

A field of the dataclass takes its value from the file, or its default where the file leaves it out. A
feature that is not built is refused by name, never ignored: a config that loads means what it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from smart_grpo_jax.core.errors import UserError, nearest

Config = TypeVar("Config")


def read(
    cls: type[Config],
    data: Mapping[str, Any],
    *,
    fixed: Mapping[str, Collection[Any]],
    ignored: Collection[str],
) -> Config:
    """The dataclass `cls` filled from a config.json.

    `fixed` names the features of which only some values are built; `ignored` the entries without effect
    on the numbers. Any other entry must be off (None, False, empty).
    """
    known = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values = {}
    for name, value in data.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in known:
            values[name] = value
        elif name in fixed:
            if value not in fixed[name]:
                wanted = " or ".join(repr(v) for v in fixed[name])
                raise UserError(f"{cls.__name__}.{name}: got {value!r}, wanted {wanted}")
        elif not name.startswith("_") and name not in ignored and value not in (None, False, (), {}):
            hint = nearest(name, known | set(fixed))
            raise UserError(f"{cls.__name__}: got unknown feature {name} = {value!r} ({hint})")
    return cls(**values)
