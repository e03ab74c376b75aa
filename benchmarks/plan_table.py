"""The table of docs/tpu.md: `python benchmarks/plan_table.py [--minutes=60] [--only=WORD …]`.

Plans the published models, 512 px, LoRA, ImageReward and Aesthetic in the graph, embeddings cached, on slices
that are sold, with Flow-GRPO and with Smart-GRPO; mesh and microbatches are left to the plan. Needs libtpu.
A cell takes minutes: answers of the compiler are kept in --folder, a broken-off table goes on where it was,
and docs/tpu.md always shows the cells that are done; a row that the folder holds no answer for stays as it
was, so that several machines can share the table. Nothing new is begun after --minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.jobs import plan, plan_numbers
from smart_grpo_jax.main import run_file
from smart_grpo_jax.runtime import topologies
from smart_grpo_jax.runtime.aot import LATE
from smart_grpo_jax.runtime.progress import duration
from smart_grpo_jax.runtime.topologies import GIB

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"sd35_medium": "SD3.5-M", "sd35_large": "SD3.5-L", "flux_dev": "FLUX.1-dev"}
METHODS = {"flow_grpo": "Flow-GRPO", "smart_grpo": "Smart-GRPO"}
SLICES = ("v5e-8", "v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-16", "v5p-64", "v6e-8", "v6e-16", "v6e-64")
PAGE = ROOT / "docs" / "tpu.md"
BEGIN, END = "<!-- plan table: begin -->", "<!-- plan table: end -->"
HEAD = ("model", "method", "slice", "chips", "fits", "mesh", "largest phase, GiB", "an epoch", "device-hours",
        "images/s")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plan the cells that are asked for, and write the table after each; 1 where none is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", default="runs/plan_table", help="where answers are kept")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after this")
    parser.add_argument("--only", action="append", default=[], help="a model, method or slice; may repeat")
    parser.add_argument("--page", default=str(PAGE), help="the page that holds the markers")
    arguments = parser.parse_args(argv)
    folder, started = Path(arguments.folder), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for cell in itertools.product(MODELS, METHODS, SLICES):
        chosen = all(any(word in cell for word in words) for words in kinds(arguments.only))
        if chosen and time.monotonic() - started < 60 * arguments.minutes:
            plan_cell(folder, *cell)
    done, page = cells(folder), Path(arguments.page)
    write(page, table(done, between(page)))
    return 0 if done else 1


def kinds(words: Sequence[str]) -> list[list[str]]:
    """The words by what they choose: a cell must match one of each kind that is named."""
    known = (tuple(MODELS), tuple(METHODS), SLICES)
    unknown = [word for word in words if not any(word in kind for kind in known)]
    if unknown:
        raise SystemExit(f"--only: got {unknown[0]}, wanted one of {', '.join(itertools.chain(*known))}")
    return [chosen for kind in known if (chosen := [word for word in words if word in kind])]


def config_of(model: str, method: str) -> Config:
    """The shipped config, whose mesh and pieces are left to the plan, with the rewards of the table."""
    values: Any = run_file(f"{ROOT / 'configs' / model}.py:{method},512,lora")
    values.rewards = {"image_reward": 1.0, "aesthetic": 1.0}
    return configs.from_dict(values)


def plan_cell(folder: Path, model: str, method: str, name: str) -> None:
    """One cell, and its file."""
    print(f"{model} {method} {name}", flush=True)
    plan_file(folder / f"{model}-{method}-{name}.json", config_of(model, method), name)


def plan_file(file: Path, config: Config, name: str) -> None:
    """The plan of a config for a slice, stored; a compiler that did not finish leaves none. Its answers are
    kept beside the file."""
    made = plan.planned(config, topologies.parse(name), plan.asker(False, str(file.parent / "answers.json")))
    found = plan_numbers.summary(made)
    print("fits" if found["fits"] else "does not fit", flush=True)
    if all(one.verdict != LATE for one in made.phases):
        for one in found["phases"].values():
            one.pop("buffers", None)
        file.write_text(json.dumps(found, indent=1) + "\n")


def cells(folder: Path) -> list[tuple[str, str, str, Mapping[str, Any]]]:
    """What is done, in the order of the table."""
    names = itertools.product(MODELS, METHODS, SLICES)
    files = [(cell, folder / f"{'-'.join(cell)}.json") for cell in names]
    return [(*cell, json.loads(file.read_text())) for cell, file in files if file.is_file()]


def table(done: Sequence[tuple[str, str, str, Mapping[str, Any]]], before: str = "") -> str:
    """The cells as Markdown, in order, and the rows of the table `before` that are not among them."""
    rows = {tuple(old.strip("| ").split(" | ")[:3]): old for old in before.splitlines()}
    made = [row(*one) for one in done]
    rows |= {tuple(cells[:3]): line(cells) for cells in made}
    order = itertools.product(MODELS.values(), METHODS.values(), SLICES)
    return "\n".join([*head(HEAD), *(rows[cell] for cell in order if cell in rows)])


def row(model: str, method: str, name: str, found: Mapping[str, Any]) -> list[str]:
    """One cell: bytes as the compiler says, times as an interval."""
    bad = [(n, p["verdict"]) for n, p in found["phases"].items() if p["verdict"] != "fits"]
    span, hours, rate = (found[k] for k in ("epoch_seconds", "device_hours_per_epoch", "images_per_second"))
    fits = found["fits"]
    return [
        MODELS[model],
        METHODS[method],
        name,
        str(found["chips"]),
        "yes" if fits else f"no ({bad[0][0]}: {bad[0][1]})",
        " × ".join(map(str, found["mesh"].values())),
        largest(found),
        f"{duration(span[0])} to {duration(span[1])}" if fits and span else "",
        f"{hours[0]:.2f} to {hours[1]:.2f}" if fits and hours else "",
        f"{rate[0]:.2f} to {rate[1]:.2f}" if fits and rate else "",
    ]


def largest(found: Mapping[str, Any]) -> str:
    """The phase that needs most of a device."""
    worst, one = max(found["phases"].items(), key=lambda item: item[1]["total_bytes"])
    return f"{worst} {one['total_bytes'] / GIB:.1f} of {found['limit_bytes'] / GIB:.1f}"


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of one."""
    return [line(names), "|" + "---|" * len(names)]


def between(page: Path, begin: str = BEGIN, end: str = END) -> str:
    """What stands between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page}: wanted the lines {begin} and {end} once each")
    return text.split(begin)[1].split(end)[0]


def write(page: Path, made: str, begin: str = BEGIN, end: str = END) -> None:
    """Put a table between the markers of a page."""
    old = between(page, begin, end)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace(f"{begin}{old}{end}", f"{begin}\n{made}\n{end}"), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
