"""Make the figures and the numbers of the docs from the logs of the runs: `python docs/make_figures.py`.

A page of docs/, or README.md, holds places such as

    <!-- made value verdict.jsonl nft second/graded -->0.584<!-- end -->

whose content this script writes from docs/results/. Kinds of places, each with the file first:

    value FILE ARM SCORE               the arm's mean at its end
    difference FILE ARM AGAINST SCORE AXIS    the difference and its interval; AXIS: end, epoch, cost, seconds
                                       at the end of what both have paid, or at a part of it: cost/2
    verdict FILE ARM AGAINST SCORE AXIS       the same in words
    table FILE AGAINST AXIS [SCORE …]  every arm against one, these scores or all
    figure FILE SCORE AXIS             the curves, drawn into docs/figures/
    paid FILE AGAINST FULL SCORE …     arms that are not trained by what a picture costs, and their share of
                                       the gain of the arm FULL
    bought FILE SCORE LABEL:ARM,ARM … …    a line per label through such arms (`*` stands for anything)
    audit FILE                         the steps of an audit.json: fidelity and gain
    totals FILES                       what the training of such files' runs has cost; `*` stands for anything

A results file is what `--mode=compare RUN … --results=docs/results/NAME.jsonl` stores. With `--check`
nothing is written, and what is stale is named (exit code 1); a test does the same.
"""

from __future__ import annotations

import functools
import html
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.jobs import (
    audit_report,
    compare,
    compare_page,
    compare_runs,
    compare_statistics,
    report_plot,
    statistics,
)
from smart_grpo_jax.jobs.compare_runs import Arm
from smart_grpo_jax.jobs.report_plot import Line

DOCS = Path(__file__).resolve().parent
PLACE = re.compile(r"<!-- made (.+?) -->(.*?)<!-- end -->", re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Write what is stale, or only name it."""
    stale = False
    made = everything(DOCS)
    for path, content in made.items():
        old = path.read_text(encoding="utf-8") if path.is_file() else None
        if old == content:
            continue
        stale = True
        print(path.relative_to(DOCS.parent))
        if "--check" not in argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
    for path in orphans(DOCS, made):
        stale = True
        print(f"{path.relative_to(DOCS.parent)}: no page shows it")
    return int(stale and "--check" in argv)


def everything(docs: Path) -> dict[Path, str]:
    """Every page with a made place and every figure, as they should be."""
    found: dict[Path, str] = {}
    for page in sorted([*docs.glob("*.md"), *docs.parent.glob("README.md")]):
        text = page.read_text(encoding="utf-8")
        if PLACE.search(text):
            found[page] = PLACE.sub(lambda match: filled(docs, match[1], found), text)
    return found


def orphans(docs: Path, made: Mapping[Path, str]) -> list[Path]:
    """Figures that no page asks for."""
    return [path for path in sorted((docs / "figures").glob("*.svg")) if path not in made]


def filled(docs: Path, asked: str, figures: dict[Path, str]) -> str:
    """A place with its content; a figure is put into `figures`."""
    kind, name, *words = asked.split()
    if kind not in KINDS:
        raise UserError(f'made: got "{kind}" ({nearest(kind, KINDS)})')
    try:
        content = KINDS[kind](docs, name, figures, *words)
    except TypeError:
        raise UserError(
            f"made {asked}: got {len(words)} words after the file, see docs/make_figures.py"
        ) from None
    return f"<!-- made {asked} -->{content}<!-- end -->"


@functools.cache
def arms(path: Path) -> list[Arm]:
    """The runs of a results file."""
    return compare_runs.load([str(there(path))])


@functools.cache
def overview(path: Path, against: str | None = None) -> dict[str, Any]:
    """What is said of each arm of a results file by itself."""
    price, origin = compare.prices(None, [str(path)])
    return compare.overview(arms(path), against, price, origin)


@functools.cache
def compared(path: Path, arm: str, against: str, score: str, axis: str) -> Mapping[str, Any]:
    """One comparison, at the end of what both have paid or at a part of it: `cost/2`."""
    found, (name, _, part) = overview(path), axis.partition("/")
    if name not in ("end", *compare_runs.AXES):
        raise UserError(f'made: got axis "{axis}" ({nearest(name, ("end", *compare_runs.AXES))})')
    one(found["scores"], name=score)
    for asked in (arm, against):
        one(found["arms"], name=asked)
    named = {some.name: some for some in arms(path)}
    return compare.row(
        named[arm], named[against], score, name, 1 / int(part or 1), found["costs"]["per_call"]
    )


def value(docs: Path, name: str, figures: dict[Path, str], arm: str, score: str) -> str:
    """The mean of an arm at its end."""
    found = one(overview(docs / "results" / name)["arms"], name=arm)
    if score not in found["scores"]:
        raise UserError(f'made: {name} has no score "{score}" ({nearest(score, found["scores"])})')
    return statistics.shown(found["scores"][score])


def difference(docs: Path, name: str, figures: dict[Path, str], *words: str) -> str:
    """The difference of two arms with its interval."""
    return compare_statistics.told(compared(docs / "results" / name, *words))


def verdict(docs: Path, name: str, figures: dict[Path, str], *words: str) -> str:
    """What that difference shows."""
    return compare_statistics.WORDS[compared(docs / "results" / name, *words)["verdict"]]


def table(docs: Path, name: str, figures: dict[Path, str], against: str, axis: str, *names: str) -> str:
    """Every arm: these scores (none: all) at its end, and the differences to one arm along an axis. What was
    not trained has paid nothing, and is compared at the end alone."""
    path = docs / "results" / name
    found = overview(path, against)
    scores = [one(found["scores"], name=score) for score in names] or found["scores"]
    trained = {arm["name"] for arm in found["arms"] if arm["trained"]}
    head = ["arm", "seeds", "epochs", "cost", *(s["label"] for s in scores)]
    lines = [[*head, *(f"{s['label']}, difference" for s in scores)]]
    for arm in found["arms"]:
        seeds = str(len(arm["seeds"])) if arm["trained"] else "not trained"
        cells = [arm["name"], seeds, str(arm["epochs"]), f"{arm['cost']:,.0f}"]
        cells += [statistics.shown(arm["scores"][s["name"]]) for s in scores]
        told = arm["name"] != against and (axis == "end" or {arm["name"], against} <= trained)
        rows = [compared(path, arm["name"], against, s["name"], axis) if told else None for s in scores]
        lines.append(cells + [compare_statistics.told(row) if row else "" for row in rows])
    return markdown(lines)


def figure(docs: Path, name: str, figures: dict[Path, str], score: str, axis: str) -> str:
    """The curves of a score; the picture stands alone."""
    found = overview(docs / "results" / name)
    file = f"{Path(name).stem}-{score.replace('/', '-')}-{axis}.svg"
    figures[docs / "figures" / file] = compare_page.figure(found, arms(docs / "results" / name), score, axis)
    label = one(found["scores"], name=score)["label"]
    return f"![{html.escape(label)} by {compare_runs.AXES[axis]}](figures/{file})"


def paid(docs: Path, name: str, figures: dict[Path, str], against: str, full: str, *names: str) -> str:
    """What a picture costs and is worth, cheapest first; the first score decides over the share."""
    path = docs / "results" / name
    found = overview(path, against)
    labels = [one(found["scores"], name=score)["label"] for score in names]
    at = lambda arm, score: compared(path, arm, against, score, "end")
    whole = at(full, names[0])["difference"]
    networks = {arm.name: arm.runs[0].picture["velocity"] for arm in arms(path)}
    head = ["arm", "cost of a picture", "network calls", *labels, f"{labels[0]}, difference"]
    lines = [[*head, f"of the gain of {full}"]]
    for arm in sorted(found["arms"], key=lambda arm: arm["picture"]):
        cells = [arm["name"], f"{arm['picture']:,.0f}", f"{networks[arm['name']]:,}"]
        cells += [statistics.shown(arm["scores"][score]) for score in names]
        if arm["name"] != against:
            gain = at(arm["name"], names[0])
            cells += [compare_statistics.told(gain), f"{gain['difference'] / whole:.0%}"]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    return markdown(lines)


def bought(docs: Path, name: str, figures: dict[Path, str], score: str, *families: str) -> str:
    """A score over what a picture costs."""
    found = overview(docs / "results" / name)
    drawn = []
    for family in families:
        label, _, patterns = family.partition(":")
        some = [a for a in found["arms"] if any(fnmatch(a["name"], p) for p in patterns.split(","))]
        if not some:
            raise UserError(f"made: {name} has no arm like {patterns}")
        some.sort(key=lambda arm: arm["picture"])
        points = [[arm["picture"] for arm in some], [arm["scores"][score] for arm in some]]
        drawn.append(Line(label.replace("_", " "), *points, dots=True))
    label = one(found["scores"], name=score)["label"]
    file = f"{Path(name).stem}-{score.replace('/', '-')}-bought.svg"
    width, height = compare_page.FIGURE
    svg = report_plot.lines(
        drawn, title=label, x_label="weighted calls a picture", y_label=label, width=width, height=height
    )
    figures[docs / "figures" / file] = compare_page.alone(svg)
    return f"![{html.escape(label)} by what a picture costs](figures/{file})"


def audit(docs: Path, name: str, figures: dict[Path, str]) -> str:
    """Fidelity of the decode and gain of the finished image, step by step."""
    path = there(docs / "results" / name)
    found = audit_report.from_json(json.loads(path.read_text(encoding="utf-8")))
    places = audit_report.digits(found.group_std)
    lines = [["step", "t", "fidelity", "gain of the finished image"]]
    for step in found.steps:
        words = [step.fidelity.words(2), step.gain.words(places)]
        lines.append([str(step.step), f"{step.t:.3f}", *words])
    return markdown(lines)


def totals(docs: Path, name: str, figures: dict[Path, str]) -> str:
    """Lines, runs, epochs, calls and minutes of each results file with trained lines, and their sums."""
    lines = [["experiment", "lines", "runs", "epochs", "weighted calls", "minutes of training"]]
    sums = np.zeros(5)
    for path in sorted((docs / "results").glob(name)):
        found = [arm for arm in arms(path) if arm.trained]
        if not found:
            continue
        price, _ = compare.prices(None, [str(path)])
        ends = [run.points[-1] for arm in found for run in arm.runs]
        paid = sum(compare_runs.weighted(end.calls, price) for end in ends)
        minutes = sum(end.seconds for end in ends) / 60
        row = [len(found), len(ends), sum(end.epoch for end in ends), paid, minutes]
        lines.append([f"`{path.stem}`", *(f"{number:,.0f}" for number in row)])
        sums += row
    if len(lines) == 1:
        raise UserError(f"made: no trained line in {name}")
    return markdown([*lines, ["together", *(f"{number:,.0f}" for number in sums)]])


def there(path: Path) -> Path:
    """The path of a file that exists."""
    if not path.is_file():
        raise UserError(f"made: no file {path}")
    return path


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; the first line is its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def one(rows: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    """The one row with these values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if len(found) != 1:
        said = ", ".join(f"{key} = {value}" for key, value in wanted.items())
        raise UserError(f"made: got {len(found)} results with {said}, wanted one")
    return found[0]


KINDS: Mapping[str, Callable[..., str]] = {
    "value": value,
    "difference": difference,
    "verdict": verdict,
    "table": table,
    "figure": figure,
    "paid": paid,
    "bought": bought,
    "audit": audit,
    "totals": totals,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
