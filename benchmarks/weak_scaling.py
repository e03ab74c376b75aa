"""Weak scaling by the compiler: `python benchmarks/weak_scaling.py [--config=configs/sd35_medium.py]`.

The same work per chip on 8 to 256 chips: prompt groups and microbatches grow with the slice, `mesh.fsdp`
stays. From the compiled programs: bytes that a chip sends in an epoch, by mesh axis, and the time per image
of a chip at both ends of the plan's interval; efficiency is that time on the smallest slice over that on
this one. Exit code 1 where bytes per chip differ by more than 5 % between slices that have a data axis.
Needs libtpu; answers are kept in --folder, and docs/tpu.md shows the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plan_table import PAGE, write
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.jobs import microbatch, plan, plan_numbers
from smart_grpo_jax.jobs.plan_numbers import Plan
from smart_grpo_jax.main import run_file
from smart_grpo_jax.runtime import topologies
from smart_grpo_jax.runtime.topologies import GIB

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- weak scaling: begin -->", "<!-- weak scaling: end -->"
PHASES = ("rollout", "update")
TOLERANCE = 0.05
HEAD = ("slice", "chips", "mesh", "images", "data, GiB", "fsdp, GiB", "all, GiB", "chip-seconds per image",
        "efficiency")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plan every slice, print and write the table; 1 where traffic per chip grows with the slice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "sd35_medium.py:smart_grpo,512,lora"))
    parser.add_argument("--slices", default="v5e:2x4,v5e:4x4,v5e:8x8,v5e:16x16")
    parser.add_argument("--groups", type=int, default=8, help="prompt groups on the smallest slice")
    parser.add_argument("--fsdp", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="images per chip in a call of each kind")
    parser.add_argument("--folder", default="runs/weak_scaling")
    parser.add_argument("--page", default=str(PAGE), help="the page that holds the markers; empty: none")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = arguments.slices.split(",")
    smallest = topologies.parse(names[0]).chips
    ask, found = plan.asker(False, str(folder / "answers.json")), []
    for name in names:
        topology = topologies.parse(name)
        config = scaled(arguments, topology.chips, topology.chips // smallest)
        found.append(numbers(plan.planned(config, topology, ask, PHASES)))
        print(json.dumps(found[-1]), flush=True)
    made = table(found)
    print(made)
    if arguments.page:
        write(Path(arguments.page), made, BEGIN, END)
    return int(not flat(found))


def scaled(arguments: argparse.Namespace, chips: int, times: int) -> Config:
    """The config with `times` the groups of the smallest slice and as many rows on each chip."""
    values: Any = run_file(arguments.config)
    values.prompts.groups, values.mesh.fsdp = arguments.groups * times, arguments.fsdp
    values.rewards, values.eval_rewards = {"image_reward": 1.0, "aesthetic": 1.0}, {}
    config = configs.from_dict(values)
    rows = arguments.rows * chips
    states = config.sampler.steps * chips
    candidates = max(chips, rows // config.search.candidates)
    pieces = {"rollout": 0, "decode": rows, "reward": rows, "chunk": candidates, "train": states}
    return dataclasses.replace(microbatch.with_numbers(config, pieces))


def numbers(made: Plan) -> dict[str, Any]:
    """What one slice says, per chip."""
    found = plan_numbers.summary(made)
    sent: dict[str, float] = {}
    for one in made.phases:
        for axes, size in one.found.get("sent_bytes", {}).items():
            sent[axes] = sent.get(axes, 0.0) + one.found["times"] * size
    images = made.phases[0].found.get("images", 0)
    span = found["epoch_seconds"] or [0.0, 0.0]
    return {
        "slice": made.topology.name,
        "chips": made.topology.chips,
        "mesh": dict(made.mesh),
        "fits": made.fits,
        "images": images,
        "sent_bytes": sent,
        "chip_seconds_per_image": [s * made.topology.chips / images if images else 0.0 for s in span],
        "verdicts": {one.name: one.verdict for one in made.phases},
    }


def flat(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a chip sends the same on every slice, those without a data axis left out."""
    sizes = [sum(one["sent_bytes"].values()) for one in found if one["mesh"]["data"] > 1]
    return bool(sizes) and max(sizes) <= (1 + TOLERANCE) * min(sizes)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line per slice."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    first = found[0]["chip_seconds_per_image"]
    for one in found:
        low, high = one["chip_seconds_per_image"]
        share = [a / b if b else 0.0 for a, b in zip(first, (low, high), strict=True)]
        axes = one["sent_bytes"]
        with_data = sum(size for names, size in axes.items() if "data" in names)
        cells = (
            one["slice"],
            str(one["chips"]),
            " × ".join(map(str, one["mesh"].values())),
            f"{one['images']:,}",
            f"{with_data / GIB:,.2f}",
            f"{(sum(axes.values()) - with_data) / GIB:,.2f}",
            f"{sum(axes.values()) / GIB:,.2f}",
            f"{low:,.2f} to {high:,.2f}",
            f"{100 * min(share):.1f} %",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
