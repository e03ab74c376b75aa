"""Published tensors that hold several of ours one above the other (q, k and v), shown as single ones.

`Split` wraps a reader and shows `blocks.0.attn.q.weight`, … for the rows of `blocks.0.attn.qkv.weight`;
`fuse` puts them together again for a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.streaming import Reader, long_axis


@dataclasses.dataclass(frozen=True)
class Fused:
    """Keys that match `pattern` hold equal parts along their first axis; `parts` are templates of the
    match, one per part."""

    pattern: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Span:
    """Part `index` of `count` of a tensor of the file."""

    key: str
    index: int
    count: int


class Split:
    """A reader (hub/streaming.py) whose fused tensors are parted."""

    def __init__(self, reader: Reader, rules: Sequence[Fused]) -> None:
        self.reader = reader
        self.spans: dict[str, Span] = {}
        for key in reader.keys():
            self.spans.update(parted(key, rules) or {key: Span(key, 0, 1)})
        for span in self.spans.values():
            shape = reader.shape(span.key)
            if span.count > 1 and (not shape or shape[0] % span.count or shape[0] == 0):
                wanted = f"wanted {span.count} equal parts"
                raise UserError(f"{reader.file(span.key)}: {span.key!r} has shape {shape}, {wanted}")

    def keys(self) -> set[str]:
        """The keys, parted."""
        return set(self.spans)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor or of its part."""
        span, shape = self.spans[key], self.reader.shape(self.spans[key].key)
        return (shape[0] // span.count, *shape[1:]) if span.count > 1 else shape

    def tensor(self, key: str) -> np.ndarray:
        """Read one tensor or part."""
        span = self.spans[key]
        if span.count == 1:
            return self.reader.tensor(span.key)
        height = self.shape(key)[0]
        return self.reader.rows(span.key, span.index * height, (span.index + 1) * height)

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Read [start:stop] along the first axis that is longer than one."""
        span, shape = self.spans[key], self.shape(key)
        if span.count == 1:
            return self.reader.rows(span.key, start, stop)
        if (axis := long_axis(shape)) == 0:
            first = span.index * shape[0]
            return self.reader.rows(span.key, first + start, first + stop)
        return self.tensor(key)[(slice(None),) * axis + (slice(start, stop),)]  # one row per part

    def file(self, key: str) -> str:
        """The name of the file that holds, or should hold, the tensor."""
        return self.reader.file(self.spans[key].key if key in self.spans else key)


def parted(key: str, rules: Sequence[Fused]) -> dict[str, Span]:
    """Names and spans of the parts of a fused tensor; empty where it is none."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, key):
            count = len(rule.parts)
            return {match.expand(part): Span(key, i, count) for i, part in enumerate(rule.parts)}
    return {}


def fuse(
    tensors: Mapping[str, np.ndarray], rules: Sequence[Fused], fused: Sequence[str]
) -> dict[str, np.ndarray]:
    """Tensors with the parts of the keys `fused` put one above the other under their own names."""
    rest = dict(tensors)
    joined = {}
    for key in fused:
        joined[key] = np.concatenate([rest.pop(part) for part in parted(key, rules)])
    return rest | joined
