"""Reads tests/golden, with channels last."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "golden"

# The tolerances of tests/golden/README.md.
MEANS = dict(rtol=1e-5, atol=2e-6)
LOG_PROBS = dict(rtol=0, atol=2e-6)
LAST_LOG_PROB = dict(rtol=0, atol=5e-6)
RATIOS = dict(rtol=0, atol=1e-6)
DOUBLE = dict(rtol=1e-10, atol=1e-13)


def load(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return {k: arrays[k] for k in arrays.files}


def nhwc(a):
    return np.moveaxis(a, -3, -1)
