"""What compilers said before: a long table of plans can be broken off and finished later."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from smart_grpo_jax.runtime.aot import CRASHED, FITS, TOO_LARGE, Outcome
from smart_grpo_jax.runtime.aot_measure import libtpu_version
from smart_grpo_jax.runtime.files import write_atomic

SOURCES = ("core", "maths", "models", "policy", "hub", "rewards", "runtime", "jobs")
NOT_COMPILED = (
    "report",
    "plan_text",
    "plan_picture",
    "plan_sweep",
    "plan_numbers",
    "audit",
    "pretrain",
    "speed",
)
"""Beginnings of files in jobs/ that no program is made of."""


class Cache:
    """Answers in a folder, one file each; nothing where there is no folder. Only final answers are kept."""

    def __init__(self, folder: Path | None, exact: bool) -> None:
        self.folder, self.exact = folder, exact

    def file(self, request: Mapping[str, Any]) -> Path:
        """Where an answer lies: named by all that it depends on."""
        assert self.folder is not None
        name = f"{request['topology']}-{request['program']}".replace(":", "-")
        return self.folder / f"{name}-{key({**request, 'exact': self.exact})}.json"

    @property
    def programs(self) -> str:
        """Where compiled programs are kept; empty for nowhere."""
        return str(self.folder / "programs") if self.folder else ""

    def get(self, request: Mapping[str, Any]) -> Outcome | None:
        """The answer, if it is known."""
        if self.folder is None or not self.file(request).is_file():
            return None
        return Outcome(**json.loads(self.file(request).read_text()))

    def put(self, request: Mapping[str, Any], outcome: Outcome) -> Outcome:
        """Keep an answer; a compiler that was late or failed is asked again the next time."""
        if self.folder is not None and outcome.verdict in (FITS, TOO_LARGE, CRASHED):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file(request), json.dumps(outcome._asdict()).encode())
        return outcome


def key(request: Mapping[str, Any]) -> str:
    """A digest of the question, the code and the compiler."""
    asked = json.dumps([dict(request), version()], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


@functools.cache
def version() -> str:
    """A digest of the code that programs are made of, and of what compiles them."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(f"{jax.__version__} {libtpu_version()}".encode())
    for file in sorted(path for name in SOURCES for path in (root / name).rglob("*.py")):
        if not (file.parent.name == "jobs" and file.name.startswith(NOT_COMPILED)):
            digest.update(file.read_bytes())
    return digest.hexdigest()
