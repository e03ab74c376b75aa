"""Make the figures and the numbers of the docs from the logs of the runs: `python docs/make_figures.py`.

A page holds places such as

    <!-- made value one_seed.jsonl shapes second/graded -->0.674<!-- end -->

whose content this script writes from docs/results/. Kinds of places, each with the file first:

    value FILE ARM SCORE               the arm's mean at its end
    difference FILE ARM AGAINST SCORE AXIS    the difference and its interval; AXIS: end, epoch, cost, seconds
    verdict FILE ARM AGAINST SCORE AXIS       the same in words
    table FILE AGAINST AXIS [SCORE …]  every arm against one, these scores or all
    figure FILE SCORE AXIS             the curves, drawn into docs/figures/

A results file is what `--mode=compare RUN … --results=docs/results/NAME.jsonl` stores. With `--check`
nothing is written, and what is stale is named (exit code 1); a test does the same.
"""

from __future__ import annotations

import functools
import html
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.jobs import compare, compare_page, compare_runs, compare_statistics
from smart_grpo_jax.jobs.compare_runs import Arm

DOCS = Path(__file__).resolve().parent
PLACE = re.compile(r"<!-- made (.+?) -->(.*?)<!-- end -->", re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Write what is stale, or only name it."""
    stale = False
    for path, content in everything(DOCS).items():
        old = path.read_text(encoding="utf-8") if path.is_file() else None
        if old == content:
            continue
        stale = True
        print(path.relative_to(DOCS.parent))
        if "--check" not in argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
    for path in orphans(DOCS):
        stale = True
        print(f"{path.relative_to(DOCS.parent)}: no page shows it")
    return int(stale and "--check" in argv)


def everything(docs: Path) -> dict[Path, str]:
    """Every page with a made place and every figure, as they should be."""
    found: dict[Path, str] = {}
    for page in sorted(docs.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if PLACE.search(text):
            found[page] = PLACE.sub(lambda match: filled(docs, match[1], found), text)
    return found


def orphans(docs: Path) -> list[Path]:
    """Figures that no page asks for."""
    return [path for path in sorted((docs / "figures").glob("*.svg")) if path not in everything(docs)]


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


@functools.lru_cache(maxsize=32)
def arms(path: Path) -> list[Arm]:
    """The runs of a results file."""
    if not path.is_file():
        raise UserError(f"made: no file {path}")
    return compare_runs.load([str(path)])


@functools.lru_cache(maxsize=64)
def result(path: Path, against: str | None) -> dict[str, Any]:
    """All that is said of a results file."""
    price, origin = compare.prices(None, [str(path)])
    return compare.compare(arms(path), against, price, origin)


def value(docs: Path, name: str, figures: dict[Path, str], arm: str, score: str) -> str:
    """The mean of an arm at its end."""
    found = one(result(docs / "results" / name, None)["arms"], name=arm)
    if score not in found["scores"]:
        raise UserError(f'made: {name} has no score "{score}" ({nearest(score, found["scores"])})')
    return f"{found['scores'][score]:.3f}"


def row(docs: Path, name: str, arm: str, against: str, score: str, axis: str) -> Mapping[str, Any]:
    """One comparison, at the end of what both have paid."""
    rows = result(docs / "results" / name, against)["comparisons"]
    return one(rows, arm=arm, score=score, axis=axis, share=1.0)


def difference(docs: Path, name: str, figures: dict[Path, str], *words: str) -> str:
    """The difference of two arms with its interval."""
    return compare.interval(row(docs, name, *words))


def verdict(docs: Path, name: str, figures: dict[Path, str], *words: str) -> str:
    """What that difference shows."""
    return compare_statistics.WORDS[row(docs, name, *words)["verdict"]]


def table(docs: Path, name: str, figures: dict[Path, str], against: str, axis: str, *names: str) -> str:
    """Every arm: these scores (none: all) at its end, and the differences to one arm along an axis."""
    found = result(docs / "results" / name, against)
    scores = [one(found["scores"], name=score) for score in names] or found["scores"]
    head = ["arm", "seeds", "epochs", "cost", *(s["label"] for s in scores)]
    head += [f"{s['label']}, difference" for s in scores]
    lines = [head, ["---"] * len(head)]
    for arm in found["arms"]:
        seeds = str(len(arm["seeds"])) if arm["trained"] else "not trained"
        cells = [arm["name"], seeds, str(arm["epochs"]), f"{arm['cost']:,.0f}"]
        cells += [f"{arm['scores'][s['name']]:.3f}" for s in scores]
        for score in scores:
            at = {"arm": arm["name"], "score": score["name"], "axis": axis, "share": 1.0}
            rows = [r for r in found["comparisons"] if all(r[k] == v for k, v in at.items())]
            cells.append(compare.interval(rows[0]) if rows else "")
        lines.append(cells)
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def figure(docs: Path, name: str, figures: dict[Path, str], score: str, axis: str) -> str:
    """The curves of a score; the picture stands alone."""
    found = result(docs / "results" / name, None)
    file = f"{Path(name).stem}-{score.replace('/', '-')}-{axis}.svg"
    figures[docs / "figures" / file] = compare_page.figure(found, arms(docs / "results" / name), score, axis)
    label = one(found["scores"], name=score)["label"]
    return f"![{html.escape(label)} by {compare_runs.AXES[axis]}](figures/{file})"


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
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
