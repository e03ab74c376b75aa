"""Typed dataclasses as a configuration language: bounds beside defaults, one line per mistake.

A field is written `option(default, doc, choices=…, low=…)`; a nested group is `section(Class)`. `build`
makes a checked instance from a nested dict, `override` applies one command-line value to such a dict,
`reference` renders the tables of docs/config.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from smart_grpo_jax.core.errors import UserError, nearest


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    auto: float | None = None,
) -> Any:
    """A field with its bounds: one of `choices`, or low <= value <= high and value > above. The word `auto`
    stands for the number `auto`, where there is one."""
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above, "auto": auto}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A field that is a group of fields."""
    return dataclasses.field(default_factory=cls)


def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain dict of a config (tuples become lists, as in JSON)."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = to_dict(value)
        else:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested dict."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def override(root: type, values: ConfigDict, name: str, text: str) -> None:
    """Apply one `--config.a.b=text` in place, parsed by the type of the field."""
    cls: type = root
    node: Any = values
    parts = name.split(".")
    for i, part in enumerate(parts):
        fields = {f.name: f for f in dataclasses.fields(cls)}
        here = ".".join(parts[: i + 1])
        section: Any = node  # the check below would narrow `node` to a read-only type
        if not isinstance(section, (Mapping, ConfigDict)):
            raise UserError(f"{'.'.join(parts[:i])}: got {node!r}, wanted a section with fields")
        if part not in fields:
            raise UserError(f"{here}: no such field ({nearest(part, fields)})")
        kind = _types(cls)[part]
        if part not in node and (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict):
            with node.unlocked():  # a config file may leave whole sections to their defaults
                node[part] = ConfigDict(type_safe=False)
        if dataclasses.is_dataclass(kind) and i + 1 < len(parts):
            cls, node = typing.cast(type, kind), node[part]
            continue
        if typing.get_origin(kind) is dict:
            return _override_table(node, part, parts[i + 1 :], text, here)
        if dataclasses.is_dataclass(kind):
            fields_there = ", ".join(_types(typing.cast(type, kind)))
            raise UserError(f"{here}: is a section, wanted one of its fields ({fields_there})")
        if i + 1 < len(parts):
            raise UserError(f"{name}: {here} has no fields of its own")
        word = fields[part].metadata.get("auto") if text == "auto" else None
        node[part] = _parse(kind, text, here) if word is None else word
        return None
    return None


def _override_table(node: Any, part: str, rest: list[str], text: str, here: str) -> None:
    """`--config.rewards.NAME=weight`, or `--config.rewards.NAME.option=value`."""
    if not rest:
        raise UserError(f"{here}: is a table, wanted {here}.NAME=WEIGHT")
    value: Any = {"true": True, "false": False}.get(text.lower(), text)
    with contextlib.suppress(ValueError):
        value = float(text)
    if not isinstance(node[part], (Mapping, ConfigDict)):
        raise UserError(f"{here}: got {node[part]!r}, wanted a table name = weight")
    table = dict(node[part])
    if len(rest) == 1:
        table[rest[0]] = value
    else:
        old = table.get(rest[0], {})
        entry = dict(old) if isinstance(old, (Mapping, ConfigDict)) else {"weight": old}
        entry[".".join(rest[1:])] = value
        table[rest[0]] = entry
    with node.unlocked():
        node[part] = ConfigDict(table, type_safe=False)


def weight_of(entry: Any) -> float:
    """The weight in a row of a reward table: a number, or a table of options with `weight` (default 1)."""
    weight = entry.get("weight", 1.0) if isinstance(entry, (Mapping, ConfigDict)) else entry
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise UserError(f"reward weight: got {weight!r}, want a finite number")
    return float(weight)


def _types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def build(cls: type, values: Any, prefix: str = "") -> Any:
    """A checked instance of `cls` from a nested dict; every mistake is one UserError."""
    if not isinstance(values, Mapping):
        raise UserError(f"{prefix.rstrip('.')}: got {values!r}, wanted a section with fields")
    kinds = _types(cls)
    for key in values:
        if key not in kinds:
            raise UserError(f"{prefix}{key}: no such field ({nearest(str(key), kinds)})")
    out = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        if field.name not in values:
            continue
        if dataclasses.is_dataclass(kinds[field.name]):
            out[field.name] = build(kinds[field.name], values[field.name], name + ".")
        else:
            given, word = values[field.name], field.metadata["auto"]
            value = _coerce(kinds[field.name], word if given == "auto" and word is not None else given, name)
            _check_bounds(value, field.metadata, name)
            out[field.name] = value
    return cls(**out)


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """The value as the field's type; nothing is converted silently but int to float and list to tuple."""
    if isinstance(kind, types.UnionType):
        if isinstance(value, str):
            return value
        kind = next(k for k in typing.get_args(kind) if k is not str)
    origin = typing.get_origin(kind)
    if origin is dict:
        return _coerce_table(value, name)
    if origin is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, (list, tuple)) and all(_is(item, v) for v in value):
            return tuple(value)
        raise UserError(f"{name}: got {value!r}, wanted a list of {item.__name__}")
    if kind is float and _is(int, value):
        value = float(value)
    if not _is(kind, value):
        raise UserError(f"{name}: got {value!r}, wanted {_article(kind)}")
    return value


def _coerce_table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name}: got {value!r}, wanted a table name = weight")
    for key, entry in value.items():
        weight = entry.get("weight", 1.0) if isinstance(entry, Mapping) else entry
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise UserError(f"{name}.{key}: got weight {weight!r}, wanted a finite number")
    return {str(k): (dict(v) if isinstance(v, Mapping) else float(v)) for k, v in value.items()}


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _check_bounds(value: Any, bounds: Mapping[str, Any], name: str) -> None:
    if bounds["choices"] and value not in bounds["choices"]:
        raise UserError(f'{name}: got "{value}" ({nearest(value, bounds["choices"])})')
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if not math.isfinite(value):
        raise UserError(f"{name}: got {value}, wanted a finite number")
    for key, wanted, broken in (
        ("low", "≥", lambda b: value < b),
        ("high", "≤", lambda b: value > b),
        ("above", ">", lambda b: value <= b),
    ):
        if bounds[key] is not None and value != bounds["auto"] and broken(bounds[key]):
            raise UserError(f"{name}: got {value:g}, wanted {wanted} {bounds[key]:g}")


def _parse(kind: Any, text: str, name: str) -> Any:
    """Text from the command line as the type of a field."""
    if isinstance(kind, types.UnionType):
        listed = text.strip("([])").replace(" ", "")
        if listed and all(p.lstrip("-").isdigit() for p in listed.split(",") if p):
            return [int(p) for p in listed.split(",") if p]
        return text
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return [_parse(item, p.strip(), name) for p in text.strip("([])").split(",") if p.strip()]
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise UserError(f'{name}: got "{text}", wanted true or false')
        return known[text.lower()]
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise UserError(f'{name}: got "{text}", wanted {_article(kind)}') from None


def reference(root: type) -> str:
    """The config reference as Markdown, one table per section."""
    lines: list[str] = []
    for name, cls in _sections(root, ""):
        lines += [f"\n## {name or 'top level'}\n", cls.__doc__.strip(), ""]  # type: ignore[union-attr]
        lines += ["| field | default | allowed | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            if not field.metadata:
                continue
            value = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            lines.append(
                f"| `{name + '.' if name else ''}{field.name}` | `{value!r}` | {_allowed(field.metadata)} | "
                f"{field.metadata['doc']} |"
            )
    return "\n".join(lines) + "\n"


def _allowed(bounds: Mapping[str, Any]) -> str:
    if bounds["choices"]:
        return ", ".join(bounds["choices"])
    parts = [
        f"{sign} {bounds[key]:g}"
        for key, sign in (("low", "≥"), ("above", ">"), ("high", "≤"))
        if bounds[key] is not None
    ]
    return " and ".join(parts) + (" or `auto`" if bounds["auto"] is not None else "")


def _sections(cls: type, name: str) -> Iterator[tuple[str, type]]:
    yield name, cls
    for key, kind in _types(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _sections(typing.cast(type, kind), f"{name}.{key}" if name else key)
