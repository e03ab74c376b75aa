"""TensorBoard events in the background: never waited for, never fatal.

`clu.metric_writers` imports TensorFlow (10-30 s), so it is imported by a thread and everything queues
until it is there. TensorBoard files cannot be cut back. They hold nothing but what metrics.jsonl holds,
so a resumed run deletes the scalars' files and writes them again from the lines that were kept. Images
lie in a folder of their own and stay: a resumed run draws the same picture at the same epoch again.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smart_grpo_jax.runtime.files import remove

CLOSE_SECONDS = 60.0


class Events:
    """A queue with a thread behind it that owns the writers."""

    def __init__(self, folder: Path, history: list[dict[str, Any]], say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._queue: queue.SimpleQueue[tuple[str, int, dict[str, Any]] | None] = queue.SimpleQueue()
        self._off = threading.Event()
        for row in history:
            self.scalars(row)
        self._thread = threading.Thread(target=self._run, name="tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, row: dict[str, Any]) -> None:
        """Queues one line of metrics.jsonl; its epoch is the horizontal axis."""
        values = {k: float(v) for k, v in row.items() if k != "epoch" and type(v) in (int, float)}
        self._put("scalars", int(row["epoch"]), values)

    def images(self, epoch: int, name: str, images: np.ndarray) -> None:
        """Queues images[n,H,W,3] in [0,1]."""
        self._put("images", int(epoch), {name: np.array(images)})

    def close(self) -> None:
        """Writes what is queued, and gives up after a minute: a slow import must not hold up the end."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _put(self, kind: str, epoch: int, values: dict[str, Any]) -> None:
        if not self._off.is_set():
            self._queue.put((kind, epoch, values))

    def _run(self) -> None:
        try:
            writers = open_writers(self._folder)
            while (item := self._queue.get()) is not None:
                kind, epoch, values = item
                write = writers[kind].write_scalars if kind == "scalars" else writers[kind].write_images
                write(epoch, values)
                if self._queue.empty():
                    writers[kind].flush()
            for writer in writers.values():
                writer.close()
        except Exception as error:  # whatever TensorFlow does, the run goes on
            self._off.set()
            reason = " ".join(str(error).split())[:90] or type(error).__name__
            self._say(
                f"TensorBoard events are off: {reason} (pip install smart_grpo_jax[tensorboard]); "
                "metrics.jsonl has everything"
            )


def open_writers(folder: Path) -> dict[str, Any]:
    """The writers for scalars and images; TensorFlow is kept off the accelerators, which are JAX's."""
    tensorflow = importlib.import_module("tensorflow")
    for kind in ("GPU", "TPU"):
        tensorflow.config.set_visible_devices([], kind)
    metric_writers = importlib.import_module("clu.metric_writers")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events.out.tfevents.*"):
        remove(old)
    return {
        "scalars": metric_writers.SummaryWriter(str(folder)),
        "images": metric_writers.SummaryWriter(str(folder / "images")),
    }
