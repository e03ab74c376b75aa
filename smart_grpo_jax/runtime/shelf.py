"""Where checkpoints stand: names, the commit by renaming, what is kept, what is set aside.

checkpoints/20          finished
checkpoints/tmp-…       being written or deleted; never counted, goes at the next start
checkpoints/20.old      was being replaced by another 20
checkpoints/20.bad-1    found damaged, kept for inspection
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime.files import free_name, fsync_folder, remove, storage
from smart_grpo_jax.runtime.manifest import Damaged, read_manifest, verify_files

EPOCH = re.compile(r"\d+")
LEFTOVER = re.compile(r"tmp-.*")
REPLACED = re.compile(r"(\d+)\.old")
BAD = re.compile(r"\d+\.bad-\d+")


class Shelf:
    """The folder `checkpoints/`; with `read_only` nothing in it is renamed or removed."""

    def __init__(self, path: Path, say: Callable[[str], None], *, read_only: bool) -> None:
        self.path, self._say, self._read_only = path, say, read_only

    def __getitem__(self, epoch: int) -> Path:
        return self.path / str(epoch)

    def temporary(self, epoch: int) -> Path:
        """Where a checkpoint is written."""
        return self.path / f"tmp-{epoch}"

    def epochs(self) -> list[int]:
        """The epochs of all finished checkpoints, ascending."""
        return sorted(int(name) for name in self._names(EPOCH))

    def any_bad(self) -> bool:
        """Whether a damaged checkpoint was set aside here."""
        return bool(self._names(BAD))

    def best(self) -> int | None:
        """The epoch with the highest score; the later of equals; None where nothing was scored."""
        scores = {epoch: self._score(epoch) for epoch in self.epochs()}
        scored = [(score, epoch) for epoch, score in scores.items() if score is not None]
        return max(scored)[1] if scored else None

    def _score(self, epoch: int) -> float | None:
        try:
            return read_manifest(self[epoch])["score"]
        except (Damaged, UserError):
            return None

    def _names(self, pattern: re.Pattern[str]) -> list[str]:
        if not self.path.is_dir():
            return []
        return [name for name in os.listdir(self.path) if pattern.fullmatch(name)]

    def open(self) -> None:
        """Makes the folder, removes what never counted, and ends a replacement that was cut short."""
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self._names(LEFTOVER):
                remove(self.path / name)
            for name in self._names(REPLACED):
                final = self.path / name.removesuffix(".old")
                if final.exists():
                    remove(self.path / name)
                else:
                    os.rename(self.path / name, final)

    def discard(self, epoch: int) -> None:
        """Removes what an unfinished save has left, orbax's own temporary folders included."""
        for name in self._names(re.compile(rf"tmp-{epoch}(\..*)?")):
            remove(self.path / name)

    def commit(self, epoch: int) -> None:
        """Makes the written checkpoint count: one rename, after everything in it is on the disk."""
        tmp, final, old = self.temporary(epoch), self[epoch], self.path / f"{epoch}.old"
        for folder in (tmp, *(p for p in tmp.rglob("*") if p.is_dir())):
            fsync_folder(folder)
        if final.exists():
            remove(old)
            os.rename(final, old)
        os.rename(tmp, final)
        fsync_folder(self.path)
        remove(old)

    def prune(self, keep: int, *, keep_best: bool) -> None:
        """Removes all but the newest `keep` and, if wanted, the best."""
        kept: set[int | None] = set(self.epochs()[-keep:])
        if keep_best:
            kept.add(self.best())
        for epoch in set(self.epochs()) - kept:
            # Renamed first: half a folder must never pass for a damaged checkpoint.
            doomed = self.path / f"tmp-pruned-{epoch}"
            os.rename(self[epoch], doomed)
            remove(doomed)

    def first_intact(self, epochs: list[int]) -> int:
        """The newest of these epochs whose files are as written, or -1; damaged ones are set aside."""
        for epoch in sorted(epochs, reverse=True):
            try:
                verify_files(self[epoch], read_manifest(self[epoch]))
                return epoch
            except Damaged as damage:
                self.set_aside(epoch, str(damage))
        return -1

    def set_aside(self, epoch: int, damage: str) -> None:
        """Takes a damaged checkpoint out of the row, and says what is wrong with it."""
        kept_as = ""
        if not self._read_only:
            bad = free_name(self.path / f"{epoch}.bad-{{n}}")
            with storage(self[epoch]):
                os.rename(self[epoch], bad)
            kept_as = f" (kept as {bad.name})"
        self._say(f"WARNING: checkpoint {epoch} is damaged: {damage}{kept_as}; trying the one before it")
