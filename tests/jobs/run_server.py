"""Runs commands one after the other in forked processes, for test_faults.py.

Most of a start is imports, so they are paid once; nothing of jax has started before a fork. Each line on
stdin is a JSON object: `argv`, `log` (a file for stdout and stderr), and `stop`, either null or a phase
[name, step] that sends the process SIGTERM when it is entered. Answers: `pid N`, then `ended CODE`.
"""

import contextlib
import json
import os
import signal
import sys
import traceback

from jax._src import xla_bridge

from smart_grpo_jax import main, worker
from smart_grpo_jax.jobs import check, report, train  # noqa: F401
from smart_grpo_jax.runtime import compile_cache, distributed, progress, watchdog  # noqa: F401

assert not xla_bridge._backends, "a device was touched before the fork"


def stop_at(name, step):
    """SIGTERM to ourselves at the beginning of a phase, as a scheduler would send it."""
    phase = watchdog.Watchdog.phase

    @contextlib.contextmanager
    def stopping(self, entered, at, **options):
        with phase(self, entered, at, **options):
            if (entered, at) == (name, step):
                os.kill(os.getpid(), signal.SIGTERM)
            yield

    watchdog.Watchdog.phase = stopping
    if name == "loading":
        assemble = train.assemble.assemble

        def loading(config):
            os.kill(os.getpid(), signal.SIGTERM)
            return assemble(config)

        train.assemble.assemble = loading


def child(job):
    worker.redirect(job["log"])
    if job["stop"]:
        stop_at(*job["stop"])
    try:
        code = main.main(job["argv"])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def serve():
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(f"pid {pid}", flush=True)
        _, status = os.waitpid(pid, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
