"""All tests run on the CPU and keep what they compile: set before anything imports jax."""

import os
import tempfile
from pathlib import Path


def cache_folder():
    """A folder of the user's; where there is none, the system's temporary one."""
    for base in (os.environ.get("XDG_CACHE_HOME"), str(Path.home() / ".cache"), tempfile.gettempdir()):
        if base is None:
            continue
        folder = Path(base) / "smart_grpo_jax" / "tests"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    raise RuntimeError("no folder can be written")


# These programs run for milliseconds, and LLVM's full optimisation takes seconds for each of them.
QUICK = "--xla_backend_optimization_level"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}=1".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache_folder())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
