"""The one way to look a name up in a table: an unknown name fails and says which are known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def choose(table: Mapping[str, Row], name: str, what: str) -> Row:
    """The row called `name`; ValueError with the nearest name, or all of them, where there is none."""
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), table, n=1, cutoff=0.5)
    hint = f'try "{close[0]}"' if close else "known: " + ", ".join(sorted(table))
    raise ValueError(f"{what}: got {name!r}, {hint}")
