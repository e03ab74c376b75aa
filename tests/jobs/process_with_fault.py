"""One of several processes of the entry point, with a fault to come: for test_watchdog_faults.py.

`SGRPO_TEST_FAULT` is a JSON object: `rank`, `phase`, `step`, `action` (kill, stop, sleep or term) and `once`,
a file that is made when the fault strikes; where it is there, nothing strikes. Beside it every process that
leaves at once writes its exit code and the time into `end-<rank>`.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from smart_grpo_jax import main
from smart_grpo_jax.runtime import watchdog

ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sleep": lambda: time.sleep(600),
}


def strike_at(fault):
    """In the first instant of the phase, as any other line of it might."""
    phase, mark = watchdog.Watchdog.phase, Path(fault["once"])

    @contextlib.contextmanager
    def striking(self, name, step, limited=True):
        with phase(self, name, step, limited):
            if (name, step) == (fault["phase"], fault["step"]) and not mark.exists():
                mark.write_text(json.dumps({"pid": os.getpid(), "time": time.time()}))
                ACTIONS[fault["action"]]()
            yield

    watchdog.Watchdog.phase = striking


def note_the_end(path):
    """`os._exit` leaves its time and code behind."""
    leave = os._exit

    def leaving(code):
        path.write_text(json.dumps([code, time.time()]))
        leave(code)

    os._exit = leaving


if __name__ == "__main__":
    fault, me = json.loads(os.environ["SGRPO_TEST_FAULT"]), int(os.environ["SGRPO_PROCESS_ID"])
    note_the_end(Path(fault["once"]).with_name(f"end-{me}"))
    if fault["rank"] == me:
        strike_at(fault)
    sys.exit(main.main(sys.argv[1:]))
