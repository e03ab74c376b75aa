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

    def match(self, tree: PyTree) -> PyTree:
        """The tree of values, one per leaf of `tree`."""
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        names = [path_name(path) for path, _ in leaves]
        chosen = [self.first(name) for name in names]
        patterns = [pattern.pattern for pattern, _ in self.rules]
        for name, index in zip(names, chosen, strict=True):
            if index is None:
                raise UserError(f"rules: no rule matches {name!r} ({nearest(name, patterns)})")
        for index, pattern in enumerate(patterns):
            if not any(self.rules[index][0].search(name) for name in names):
                raise UserError(f"rules: {pattern!r} matches nothing ({nearest(pattern, names)})")
        return treedef.unflatten([self.rules[index][1] for index in chosen if index is not None])
