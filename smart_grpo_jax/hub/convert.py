"""Torch files that torch_files.py does not read, turned into safetensors once, with torch's help.

    python -m smart_grpo_jax.hub.convert IN.pt OUT.safetensors [--inside=KEY]

torch reads the file with `weights_only`, which runs nothing from it. Beside OUT lies OUT's name with .json at
its end: where the numbers come from (sha256 of IN), the keys, and what was left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.hub import safetensors
from smart_grpo_jax.hub.torch_files import STATE

KEPT = ("float32", "float16", "bfloat16", "int64", "int32")
"""Types that are written; buffers of other types (masks, …) are left out and named."""


def main(argv: Sequence[str]) -> int:
    """Convert one file; returns the exit code, having printed one line."""
    parser = argparse.ArgumentParser(
        prog="python -m smart_grpo_jax.hub.convert", description="torch file → safetensors"
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT.safetensors")
    parser.add_argument(
        "--inside", help=f"the entry that holds the weights (default: {STATE!r} if there is one)"
    )
    options = parser.parse_args(argv)
    try:
        record = convert(options.source, options.target, options.inside)
    except UserError as error:
        print(error.line, file=sys.stderr)
        return error.exit_code
    left = f", left out: {', '.join(record['left_out'])}" if record["left_out"] else ""
    print(f"{options.target}: {len(record['keys'])} tensors from {options.source}{left}")
    return 0


def convert(source: Path, target: Path, inside: str | None = None) -> dict[str, Any]:
    """Write `target` and its record; returns the record."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: wanted a name that ends in .safetensors")
    if target.exists():
        raise UserError(f"{target}: is there already; remove it first or choose another name")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    state = state_dict(source, read(source), inside)
    kept = {k: tensor for k, tensor in state.items() if str(tensor.dtype).removeprefix("torch.") in KEPT}
    record = {
        "source": source.name,
        "sha256": checksum(source),
        "keys": sorted(kept),
        "left_out": sorted(set(state) - set(kept)),
    }
    if not kept:
        raise UserError(f"{source}: holds no tensor of {', '.join(KEPT)}")
    safetensors.write(target, {key: to_numpy(tensor) for key, tensor in kept.items()})
    beside = target.with_name(target.name + ".json")
    try:
        beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{beside}: could not be written ({error})") from error
    return record


def read(source: Path) -> Any:
    """What torch finds in the file; nothing in it is run."""
    try:
        import torch
    except ImportError as error:
        raise UserError("convert: needs the package torch: pip install torch") from error
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises of all kinds on foreign files
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest advises to read it unsafely
        reason = f"it names {named[1][:80]}" if named else type(error).__name__
        raise UserError(f"{source}: torch does not read it with weights_only ({reason})") from error


def state_dict(source: Path, found: Any, inside: str | None) -> dict[str, Any]:
    """The tensors by key."""
    import torch

    if not isinstance(found, dict):
        raise UserError(f"{source}: holds a {type(found).__name__}, wanted a state dict")
    if inside is None and isinstance(found.get(STATE), dict):
        inside = STATE
    if inside is not None:
        found = found.get(inside)
        if not isinstance(found, dict):
            raise UserError(f"{source}: has no dictionary {inside!r}")
    state = {key: value for key, value in found.items() if isinstance(key, str) and torch.is_tensor(value)}
    if not state:
        raise UserError(
            f"{source}: has no tensors at its top; name the entry that has them with --inside=KEY"
        )
    return state


def to_numpy(tensor: Any) -> np.ndarray:
    """The same numbers; numpy meets bfloat16 through its bits."""
    import torch

    dense = tensor.detach().contiguous()
    if dense.dtype == torch.bfloat16:
        return dense.view(torch.int16).numpy().view(safetensors.DTYPES["BF16"])
    return dense.numpy()


def checksum(source: Path) -> str:
    """sha256 of a file."""
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
