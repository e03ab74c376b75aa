"""The paper's experiments with SD3.5-M, planned: `python benchmarks/paper_plans.py [--slice=v6e-16]`.

Every line of the experiments of the paper (configs/paper/NAME.py:ARM,sd35) that is trained, compiled for a
slice that is sold; lines that compute the same are one row. Needs libtpu. A row takes minutes: answers of the
compiler are kept in --folder, a broken-off table goes on where it was, and docs/reproducing.md always shows
the rows that are done. Nothing new is begun after --minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plan_table import between, head, largest, line, plan_file, write
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.jobs import experiment_list
from smart_grpo_jax.runtime.progress import duration

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = (
    "table1",
    "figure1",
    "figure1_aesthetic",
    "figure2a",
    "figure2b",
    "control_pick",
    "control_clip",
)
PAGE = ROOT / "docs" / "reproducing.md"
BEGIN, END = "<!-- paper plans: begin -->", "<!-- paper plans: end -->"
HEAD = ("lines", "slice", "fits", "largest phase, GiB", "an epoch", "epochs", "the run", "device-hours")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan what is asked for, and write the table after each row; 1 where none is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--slice", default="v6e-16", help="a slice that is sold")
    parser.add_argument("--folder", default="runs/paper_plans", help="where answers are kept")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after this")
    parser.add_argument("--only", action="append", default=[], choices=EXPERIMENTS, help="may repeat")
    parser.add_argument("--page", default=str(PAGE), help="the page that holds the markers")
    arguments = parser.parse_args(argv)
    folder, started, done = Path(arguments.folder), time.monotonic(), 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, config, words in lines(arguments.only or EXPERIMENTS):
        file = folder / f"{name}-{arguments.slice}.json"
        if not file.is_file() and time.monotonic() - started < 60 * arguments.minutes:
            print(", ".join(words), flush=True)
            plan_file(file, config, arguments.slice)
        if file.is_file():
            done += 1
            add(Path(arguments.page), row(words, arguments.slice, config, json.loads(file.read_text())))
    return 0 if done else 1


def lines(experiments: Sequence[str]) -> list[tuple[str, Config, list[str]]]:
    """What is computed (its identity and config), and the lines that compute it."""
    found: dict[str, tuple[Config, list[str]]] = {}
    for name in experiments:
        experiment = experiment_list.read(str(ROOT / "configs" / "paper" / f"{name}.py"))
        for arm in experiment.names("sd35"):
            config = configs.from_dict(experiment.get_config(f"{arm},sd35"))
            if config.train.epochs:
                same = experiment_list.identity(configs.to_dict(config))
                found.setdefault(same, (config, []))[1].append(f"{name}:{arm}")
    return [(same, config, words) for same, (config, words) in found.items()]


def row(words: Sequence[str], name: str, config: Config, found: Mapping[str, Any]) -> list[str]:
    """One row: bytes as the compiler says, times as an interval."""
    span, hours, epochs = found["epoch_seconds"], found["device_hours_per_epoch"], config.train.epochs
    fits = found["fits"]
    return [
        ", ".join(words),
        name,
        "yes" if fits else "no",
        largest(found),
        f"{duration(span[0])} to {duration(span[1])}" if fits else "",
        str(epochs),
        f"{duration(epochs * span[0])} to {duration(epochs * span[1])}" if fits else "",
        f"{epochs * hours[0]:,.0f} to {epochs * hours[1]:,.0f}" if fits else "",
    ]


def add(page: Path, cells: Sequence[str]) -> None:
    """Put a row into the table between the markers; an older row of the same lines and slice goes."""
    old = [text for text in between(page, BEGIN, END).splitlines() if text.startswith("| ")][1:]
    kept = [text for text in old if text.strip("| ").split(" | ")[:2] != list(cells[:2])]
    write(page, "\n".join([*head(HEAD), *kept, line(cells)]), BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
