"""Compile quickly: these programs run for milliseconds, and LLVM's full optimisation takes seconds each."""

import os

FLAG = "--xla_backend_optimization_level"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=1".strip()
