"""`python -m smart_grpo_jax.worker`: one command of main.py after the other, in one process.

Each line of standard input is {"argv": […], "log": FILE}; what the command prints is added to FILE, and its
exit code is answered as a line of standard output. A list of short runs starts python once, and runs that
differ in numbers alone share their programs (jobs/programs.py).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import TextIO

from smart_grpo_jax import main


def serve(asked: Iterable[str], answers: TextIO) -> None:
    """Run what is asked until nothing more is."""
    for line in asked:
        what = json.loads(line)
        redirect(what["log"])
        try:
            code = main.main(what["argv"])
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        print(code, file=answers, flush=True)


def redirect(path: str) -> None:
    """What this process prints goes to the end of a file, also from below Python."""
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


if __name__ == "__main__":
    serve(sys.stdin, os.fdopen(os.dup(1), "w"))
