"""A trace of one epoch, for those who want to see what the device does when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.progress import say as print_line

FOLDER = "profile"
SETTLED = 3
"""The epoch of a process that is traced by default: the first two compile."""


class Trace:
    """Traces one epoch into the folder `profile/` of a run; the main process alone writes.

    `wanted` is the epoch's number; 0 takes the third that this process works, or the last where there are
    fewer; None traces nothing. `done` epochs of `total` lie behind.
    """

    def __init__(
        self,
        folder: Path,
        wanted: int | None,
        done: int,
        total: int,
        *,
        say: Callable[[str], None] = print_line,
    ) -> None:
        self._folder, self._say = folder / FOLDER, say
        if wanted and not done < wanted <= total:
            raise UserError(
                f"--profile: got {wanted}, wanted an epoch that is still to come, {done + 1}..{total}"
            )
        self._epoch = min(done + SETTLED, total) if wanted == 0 else wanted

    @contextlib.contextmanager
    def of(self, epoch: int) -> Iterator[None]:
        """The body is the work of this epoch: traced, if it is the one that was asked for."""
        if epoch != self._epoch or not distributed.is_main():
            yield
            return
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would bury what the device does
        with jax.profiler.trace(self._folder, create_perfetto_trace=True, profiler_options=options):
            yield
        traces = sorted(self._folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
        self._say(
            f"profile of epoch {epoch}: {self._folder} (pip install xprof; xprof {self._folder}), "
            f"or open {traces[-1].relative_to(self._folder.parent)} at ui.perfetto.dev"
        )
