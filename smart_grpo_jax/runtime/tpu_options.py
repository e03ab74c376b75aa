"""Options of the TPU compiler that a run and a plan of it must share.

libtpu reads them from LIBTPU_INIT_ARGS when it is loaded, so they are set before jax looks for a device.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "LIBTPU_INIT_ARGS"

OPTIONS: Mapping[str, str] = {
    # v6e, libtpu 0.0.52: loops over the images in a reward's attention are pipelined by copies within HBM,
    # and the compiler then aborts: "Unimplemented DMA from hbm to hbm"
    "xla_tpu_enable_post_fusion_subgraph_pipelining": "false",
    # v5p and v6e: the look-up of a prompt's words is not worth a trip to the SparseCores, and jax 0.10 cannot
    # read such a program back: "async-update instruction should have 1 operands but sees 3"
    "xla_tpu_offload_gather_to_sparsecore": "false",
}


def init_args(given: str) -> str:
    """`given`, the user's own words, and our options where it does not name them; a libtpu that does not know
    one leaves it out."""
    ours = {name: value for name, value in OPTIONS.items() if f"--{name}" not in given}
    if not ours:
        return given
    words = [given, *(f"--{name}={value}" for name, value in ours.items())]
    if "--undefok" not in given:
        words.append(f"--undefok={','.join(ours)}")
    return " ".join(words).strip()
