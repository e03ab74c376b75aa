"""A small training loop that resumes by itself, for test_runtime_kill.py.

`python kill_loop.py` imports once and then runs the loop in a forked process for each line
`FOLDER EPOCHS` on stdin: most of a start is imports, and the kills fall on the forked processes.
"""

import os
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.runtime.checkpoint import Checkpoints, state_hash
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.metrics import MetricLog
from smart_grpo_jax.runtime.run_folder import RunFolder


def initial():
    return {"w": np.linspace(-1, 1, 4096, dtype=np.float32), "m": np.zeros(4096, np.float32)}


@jax.jit
def step(state, epoch):
    """Momentum on a moving target; little to compile, since every start compiles it again."""
    grad = state["w"] - jnp.sin(jnp.arange(4096.0) * epoch)
    momentum = 0.9 * state["m"] + grad
    return {"w": state["w"] - 0.01 * momentum, "m": momentum}, jnp.mean(grad**2)


def run(folder, epochs, every=2):
    with (
        RunFolder.open(folder, config={"epochs": epochs}, command=sys.argv) as run_folder,
        Checkpoints(run_folder, keep=2, best_of=None) as checkpoints,
    ):
        found = checkpoints.restore(initial())
        done, state = (found.epoch, found.state) if found else (0, jax.device_put(initial()))
        with MetricLog(run_folder, tensorboard=False, resume_epoch=found and done) as log:
            print(f"from {done} {os.getpid()}", flush=True)
            for epoch in range(done + 1, epochs + 1):
                state, loss = step(state, epoch)
                log.write(epoch, epoch, {"train/loss": float(loss)})
                if epoch % every == 0:
                    checkpoints.save(epoch, state, {})
        checkpoints.wait()
        write_atomic(Path(folder) / "final.txt", state_hash(state))


def serve():
    for line in sys.stdin:
        folder, epochs = line.split()
        child = os.fork()
        if child == 0:
            try:
                run(folder, int(epochs))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
