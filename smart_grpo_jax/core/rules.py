"""Ordered regex rules over the paths of a tree, strict both ways.

    Rules((r"kernel$", P("fsdp")), (r"(bias|scale)$", P())).match(params)  ->  a tree of PartitionSpecs

The first rule that matches a path decides. A leaf that no rule matches and a rule that matches no leaf
are errors: a table that has drifted from its model must say so. Sharding, LoRA targets, weight names
and weight decay are all such tables.
"""

from __future__ import annotations

import re
from typing import Any

import jax

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Rules:
    """An ordered table of (regex, value); a regex is searched in the '/'-joined path of a leaf."""

    def __init__(self, *rules: tuple[str, Any]) -> None:
        self.rules = tuple((re.compile(pattern), value) for pattern, value in rules)

    def __repr__(self) -> str:
        rows = ", ".join(f"({pattern.pattern!r}, {value!r})" for pattern, value in self.rules)
        return f"Rules({rows})"

    def first(self, name: str) -> int | None:
        """The index of the first rule that matches the path `name`."""
        return next((i for i, (pattern, _) in enumerate(self.rules) if pattern.search(name)), None)

    def value(self, name: str) -> Any:
        """The value of the first rule that matches the path `name`."""
        index = self.first(name)
        if index is None:
            patterns = [pattern.pattern for pattern, _ in self.rules]
            raise UserError(f"rules: no rule matches {name!r} ({nearest(name, patterns)})")
        return self.rules[index][1]

    def match(self, tree: PyTree) -> PyTree:
        """The tree of values, one per leaf of `tree`."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = [path_name(path) for path, _ in leaves]
        values = [self.value(name) for name in names]
        for pattern, _ in self.rules:
            if not any(pattern.search(name) for name in names):
                text = pattern.pattern
                raise UserError(f"rules: {text!r} matches nothing ({nearest(text, names)})")
        return treedef.unflatten(values)
