"""Torch's weight files written by hand, byte by byte, so that they may say what torch never would."""

import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub.torch_files import TorchTensors

NUMBERS = np.arange(6, dtype=np.float32)


def archive(path, program, storages=None, root="archive", method=zipfile.ZIP_STORED, extra=()):
    """A torch file by hand."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(f"{root}/data.pkl", program)
        for key, content in ({"0": NUMBERS.tobytes()} if storages is None else storages).items():
            file.writestr(f"{root}/data/{key}", content)
        for name, content in extra:
            file.writestr(f"{root}/{name}", content)
    return path


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def word(text):
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def integer(number):
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if abs(number) < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def counts(numbers):
    return b"(" + b"".join(integer(n) for n in numbers) + b"t"


def tensor(shape=(6,), strides=(1,), offset=0, key="0", stored=6, kind="torch.FloatStorage", location="cpu"):
    storage = b"(" + word("storage") + name(kind) + word(key) + word(location) + integer(stored) + b"tQ"
    hooks = name("collections.OrderedDict") + b")R"
    arguments = b"(" + storage + integer(offset) + counts(shape) + counts(strides) + b"\x89" + hooks + b"t"
    return name("torch._utils._rebuild_tensor_v2") + arguments + b"R"


def state(**values):
    """A pickle of {name: value}, the values given as programs."""
    items = b"".join(word(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


def refusal(path, opening=TorchTensors):
    """The one line that a file costs; it must be cheap."""
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        opening(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    # Tracing slows an interpreter tenfold; without it the slowest of these takes 0.4 s.
    assert time.monotonic() - start < 10
    line = caught.value.line
    assert line.startswith(str(path)[:100]) and "\n" not in line
    return str(caught.value)
