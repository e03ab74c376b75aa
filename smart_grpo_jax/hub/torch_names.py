"""All that a torch weight file may name, and the records of tensors that the names make.

Four functions, the storage classes and the types: GLOBALS is the whole surface that a file can reach. A
record says where the numbers of a tensor lie; it is made only if that is inside its storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

AXES = 16
"""The most axes of a tensor."""


class Refused(ValueError):
    """The file holds something that weights do not need, or is damaged."""


class Storage(NamedTuple):
    """A run of numbers of one type in a member of the archive; `dtype` is None for untyped bytes."""

    key: str
    dtype: np.dtype | None
    count: int


class Tensor(NamedTuple):
    """A strided view of a storage; `offset` and `strides` count numbers."""

    key: str
    dtype: np.dtype
    stored: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Name(NamedTuple):
    """A name out of GLOBALS, and what it stands for."""

    text: str
    stands_for: Any


def whole(value: Any, what: str) -> int:
    """A count: an integer, not negative, that fits the offsets of a file."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise Refused(f"{what} is {brief(value)}, wanted a count")
    return value


def brief(value: Any) -> str:
    """A value of a hostile file in an error message: never walked."""
    value = value[:60] if type(value) is str else value
    return repr(value)[:60] if type(value) in (int, str, float, bool) else f"a {type(value).__name__}"


def ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An empty one; its items follow as instructions."""
    if arguments:
        raise Refused("an OrderedDict is made from arguments")
    return {}


def tensor_v2(arguments: tuple[Any, ...]) -> Tensor:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    storage, offset, shape, strides = expect(arguments, 4)
    if type(storage) is not Storage or storage.dtype is None:
        raise Refused(f"a tensor is made of {brief(storage)}, wanted a typed storage")
    return view(storage, storage.dtype, offset, shape, strides)


def tensor_v3(arguments: tuple[Any, ...]) -> Tensor:
    """(storage of bytes, offset, shape, strides, requires_grad, hooks, dtype[, metadata])."""
    storage, offset, shape, strides, _, _, name = expect(arguments, 7)
    if type(storage) is not Storage or storage.dtype is not None:
        raise Refused(f"a tensor is made of {brief(storage)}, wanted an untyped storage")
    dtype = name.stands_for if type(name) is Name else None
    if not isinstance(dtype, np.dtype):
        raise Refused(f"a tensor has type {brief(name)}, wanted a torch dtype")
    if storage.count % dtype.itemsize:
        raise Refused(f"storage {brief(storage.key)} has {storage.count} bytes of {dtype}")
    return view(storage._replace(count=storage.count // dtype.itemsize), dtype, offset, shape, strides)


def parameter(arguments: tuple[Any, ...]) -> Tensor:
    """(tensor, requires_grad, hooks)."""
    (tensor,) = expect(arguments, 1)
    if type(tensor) is not Tensor:
        raise Refused(f"a parameter is made of {brief(tensor)}, wanted a tensor")
    return tensor


def expect(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The first `count` arguments of a call."""
    if len(arguments) < count:
        raise Refused(f"a call with {len(arguments)} arguments, wanted {count}")
    return arguments[:count]


def view(storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
    """A tensor, if it lies inside its storage and is not larger than it."""
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= AXES:
        raise Refused("a tensor whose shape and strides do not fit each other")
    sizes = [whole(size, "a size") for size in shape]
    steps = [whole(stride, "a stride") for stride in strides]
    count, last = 1, whole(offset, "an offset")
    for size, step in zip(sizes, steps, strict=True):
        count *= size
        last += (size - 1) * step
    if count and last >= storage.count:
        raise Refused(f"a tensor ends at number {last + 1} of {storage.count} in {brief(storage.key)}")
    if count > storage.count:
        raise Refused(f"a tensor repeats its storage: {brief(count)} numbers out of {storage.count}")
    steps = [step if size > 1 else 0 for size, step in zip(sizes, steps, strict=True)]
    return Tensor(storage.key, dtype, storage.count, offset, tuple(sizes), tuple(steps))


TYPES: Mapping[str, tuple[str | None, Any]] = {
    "float32": ("Float", np.float32),
    "float16": ("Half", np.float16),
    "bfloat16": ("BFloat16", ml_dtypes.bfloat16),
    "float64": ("Double", np.float64),
    "int64": ("Long", np.int64),
    "int32": ("Int", np.int32),
    "int16": ("Short", np.int16),
    "int8": ("Char", np.int8),
    "uint8": ("Byte", np.uint8),
    "bool": ("Bool", np.bool_),
    "uint16": (None, np.uint16),
    "uint32": (None, np.uint32),
    "uint64": (None, np.uint64),
    "float8_e4m3fn": (None, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": (None, ml_dtypes.float8_e5m2),
}
"""torch's name of a type: its storage class, if it has one of its own, and numpy's type."""

STORAGES: Mapping[str, np.dtype | None] = {
    **{f"torch.{name}Storage": np.dtype(kind) for name, kind in TYPES.values() if name},
    "torch.storage.UntypedStorage": None,
}

CALLS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_tensor_v2": tensor_v2,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": parameter,
}

GLOBALS: Mapping[str, Any] = {
    **CALLS,
    **STORAGES,
    **{f"torch.{name}": np.dtype(kind) for name, (_, kind) in TYPES.items()},
}
"""All that a file may name."""
