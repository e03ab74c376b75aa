"""Weight files of torch, read without torch and without running anything from them.

Since 2020 `torch.save` writes a zip archive: one pickle that describes the tensors, and one stored member per
storage. The pickle goes through the interpreter of torch_pickle.py, the bytes are read range by range. What
else there is (older files, compiled modules, anything unusual) is for `python -m smart_grpo_jax.hub.convert`,
which needs torch once.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import folder, safetensors, torch_archive, torch_pickle
from smart_grpo_jax.hub.streaming import Reader, long_axis, read_exactly
from smart_grpo_jax.hub.torch_names import Refused, Tensor, brief

STATE = "state_dict"
"""Where training scripts keep the weights among other things."""

CONVERT = "python -m smart_grpo_jax.hub.convert IN OUT.safetensors"

OTHERS = {
    "pickle": f"older than torch's zip format, or a bare pickle: convert it once ({CONVERT})",
    "safetensors": "a safetensors file",
}
"""What else a file may be by its first bytes."""

BASES = ("model", "diffusion_pytorch_model")
"""Names of weight files in a folder, without their end."""


class Weights(Reader, Protocol):
    """A reader that also knows its types, its size and its own mark."""

    def dtype(self, key: str) -> np.dtype:
        """The type of a tensor, without reading it."""
        ...

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        ...

    def fingerprint(self) -> str:
        """Other weights give another one, without reading them all."""
        ...


class TorchTensors:
    """The tensors of one `.pt`, `.pth` or `.bin` file, read on demand."""

    def __init__(self, path: Path, inside: str | None = None) -> None:
        """`inside` names the entry that holds the weights; unsaid, it is "state_dict" where there is one."""
        self.path = path
        try:
            self.spans, self.starts = survey(path, inside)
        except Refused as error:
            raise UserError(f"{path}: {error}; wanted tensors only, as in a state dict") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error

    def keys(self) -> set[str]:
        """All keys."""
        return set(self.spans)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.spans[key].shape

    def dtype(self, key: str) -> np.dtype:
        """The type of a tensor."""
        return self.spans[key].dtype

    def tensor(self, key: str) -> np.ndarray:
        """Read one tensor; bfloat16 arrives as ml_dtypes.bfloat16."""
        span = self.spans[key]
        return self._read(key, span.offset, span.shape)

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Read [start:stop] along the first axis that is longer than one."""
        span = self.spans[key]
        axis = long_axis(span.shape)
        shape = (*span.shape[:axis], stop - start, *span.shape[axis + 1 :])
        return self._read(key, span.offset + start * span.strides[axis], shape)

    def file(self, key: str) -> str:
        """The path of the file, which holds every tensor."""
        del key
        return str(self.path)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(span.shape) * span.dtype.itemsize for span in self.spans.values())

    def fingerprint(self) -> str:
        """A hash of every name, type, shape and of the first kilobyte of every storage's part."""
        found = hashlib.sha256()
        for key in sorted(self.spans):
            span = self.spans[key]
            found.update(f"{key} {span.dtype.name} {span.shape} {span.strides}".encode())
            reach = 1 + last_number(span.shape, span.strides) if math.prod(span.shape) else 0
            head = self._range(key, span.offset, min(reach, 1024 // span.dtype.itemsize))
            found.update(head.tobytes())
        return found.hexdigest()

    def _read(self, key: str, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """A strided part of a storage, dense and in C order."""
        span = self.spans[key]
        if not math.prod(shape):
            return np.empty(shape, span.dtype)
        flat = self._range(key, offset, 1 + last_number(shape, span.strides))
        steps = [step * span.dtype.itemsize for step in span.strides]
        return np.ascontiguousarray(np.ndarray(shape, span.dtype, flat, 0, steps)).reshape(shape)

    def _range(self, key: str, offset: int, count: int) -> np.ndarray:
        """`count` numbers of a tensor's storage from number `offset` on."""
        span = self.spans[key]
        start = self.starts[span.key] + offset * span.dtype.itemsize
        return read_exactly(self.path, key, start, np.empty(count, span.dtype))


def open_tensors(path: Path) -> Weights:
    """Weights by what they are: a safetensors file, index or folder, or a torch file."""
    path = Path(path)
    if path.is_dir():
        found = next((file for base in BASES if (file := folder.weight_file(path, base))), None)
        found = found or next(iter(sorted(path.glob("pytorch_model.bin"))), None)
        if found is None:
            raise UserError(f"{path}: no weights; wanted model.safetensors or its index in this folder")
        path = found
    known = contents(path) in ("safetensors", "json")
    return safetensors.Tensors(path) if known else TorchTensors(path)


def contents(path: Path) -> str:
    """What a file begins with: zip, pickle, safetensors, json or unknown."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if head.startswith(torch_archive.LOCAL):
        return "zip"
    if path.suffix == ".json" and head.lstrip().startswith(b"{"):
        return "json"
    if head[8:] == b"{":
        return "safetensors"
    return "pickle" if head[:1] == b"\x80" else "unknown"


def survey(path: Path, inside: str | None) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of a file by key, and the first byte of each storage that they use."""
    if (kind := contents(path)) != "zip":
        raise Refused(OTHERS.get(kind, "neither safetensors nor a torch file"))
    members = torch_archive.directory(path)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused(f"{len(pickles)} members are called data.pkl, wanted 1")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise Refused("it is a compiled TorchScript module")
    length = path.stat().st_size
    with open(path, "rb") as file:
        small = lambda name, limit: torch_archive.read_member(file, name, members[name], length, limit)
        if f"{root}byteorder" in members and small(f"{root}byteorder", 16) != b"little":
            raise Refused("its numbers are not little-endian")
        spans = state(torch_pickle.load(small(pickles[0], torch_pickle.LONGEST)), inside)
        starts: dict[str, int] = {}
        for key, span in spans.items():
            name = f"{root}data/{span.key}"
            if name not in members:
                raise Refused(f"{key[:60]!r} lies in {name[:60]!r}, which the archive lacks")
            if members[name].size != span.stored * span.dtype.itemsize:
                wanted = f"wanted {span.stored} x {span.dtype}"
                raise Refused(f"{name[:60]!r} has {members[name].size} bytes, {wanted}")
            if span.key not in starts:
                starts[span.key] = torch_archive.data_start(file, name, members[name], length)
    return spans, starts


def state(value: Any, inside: str | None) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the entry that holds one; other entries (epoch, …) are left."""
    if type(value) is not dict:
        raise Refused(f"it holds {brief(value)}, not a dictionary")
    inside = STATE if inside is None and type(value.get(STATE)) is dict else inside
    if inside is not None:
        if type(value.get(inside)) is not dict:
            raise Refused(f"it has no dictionary {inside!r}; it has {names(value)}")
        value = value[inside]
    found = {key: tensor for key, tensor in value.items() if type(key) is str and type(tensor) is Tensor}
    if not found:
        raise Refused(f"it has no tensors at its top, only {names(value)}")
    return found


def names(value: dict[Any, Any]) -> str:
    """A few keys for a message."""
    keys = [brief(key) for key in list(value)[:6]]
    return ", ".join(keys) or "nothing"


def last_number(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Distance from the first number of a tensor to its last, in its storage."""
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
