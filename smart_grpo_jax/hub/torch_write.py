"""Write a `.pt` state dict without torch: the container of the published reward checkpoints.

A zip whose members are stored as they are: `archive/data.pkl` says which tensor lies in which of
`archive/data/0`, `archive/data/1`, … The pickle is spelled out here opcode by opcode; it names no more than
the three things that torch's own restricted loader allows.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from smart_grpo_jax.core.errors import StorageError, UserError

STORAGES: Mapping[np.dtype, str] = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
}

PROTOCOL_2, STOP = b"\x80\x02", b"."
MARK, TUPLE, EMPTY_TUPLE, REDUCE, SETITEMS = b"(", b"t", b")", b"R", b"u"
PERSISTENT_ID, FALSE = b"Q", b"\x89"
FIXED_TIME = (1980, 1, 1, 0, 0, 0)
"""Equal tensors make an equal file."""


def name(module: str, attribute: str) -> bytes:
    """A global."""
    return b"c" + f"{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """A string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """An integer, signed 32 bits or as many as it takes."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw


def numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers."""
    return MARK + b"".join(map(number, values)) + TUPLE


EMPTY_ORDERED_DICT = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE


def tensor(index: int, array: np.ndarray) -> bytes:
    """_rebuild_tensor_v2(storage, offset 0, shape, strides, no gradient, no hooks)."""
    storage = MARK + text("storage") + name("torch", STORAGES[array.dtype])
    storage += text(str(index)) + text("cpu") + number(array.size) + TUPLE + PERSISTENT_ID
    strides = tuple(step // array.itemsize for step in array.strides)
    arguments = storage + number(0) + numbers(array.shape) + numbers(strides) + FALSE + EMPTY_ORDERED_DICT
    return name("torch._utils", "_rebuild_tensor_v2") + MARK + arguments + TUPLE + REDUCE


def members(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the zip's files."""
    items = [text(key) + tensor(i, array) for i, (key, array) in enumerate(tensors.items())]
    yield "data.pkl", PROTOCOL_2 + EMPTY_ORDERED_DICT + MARK + b"".join(items) + SETITEMS + STOP
    yield "byteorder", b"little"
    for i, array in enumerate(tensors.values()):
        yield f"data/{i}", array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    yield "version", b"3\n"


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one state dict; it appears under its name only when it is complete."""
    whole = {key: np.require(array, requirements="C") for key, array in tensors.items()}
    for key, array in whole.items():
        if array.dtype not in STORAGES:
            raise UserError(f"{path.name}: {key!r} has dtype {array.dtype}, wanted one of {list(STORAGES)}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members(whole):
            archive.writestr(zipfile.ZipInfo(f"archive/{member}", FIXED_TIME), content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error})") from error
