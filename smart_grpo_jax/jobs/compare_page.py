"""compare.html: one file without a script or a network, the same bytes for the same runs."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smart_grpo_jax.jobs import compare_statistics, report_pictures, report_plot, report_style, statistics
from smart_grpo_jax.jobs.compare_runs import AXES, Arm
from smart_grpo_jax.jobs.report_plot import Line
from smart_grpo_jax.jobs.report_sections import duration, lead, section, table

MOST_LINES = 8
"""Arms in one plot; of more, those that end highest and the one that is compared against."""
SHOWN = 8
"""Prompts whose pictures are shown."""

FIGURE = (820, 340)
"""Size of a figure that stands alone."""

COLOURS = ("#0a67ad", "#bf4a00", "#00785a", "#9a4f86", "#6b5b00", "#5a6371", "#c02f4f", "#3a3fb5")
STYLE = "".join(
    f".plot .line{i} {{ stroke:{c}; stroke-dasharray:{('none', '7 4', '2 4')[i // 3]}; }} "
    f".plot .fill{i}, .plot .band{i} {{ fill:{c}; }}\n"
    for i, c in enumerate(COLOURS)
)
KINDS = {"better": "right", "worse": "wrong", "open": "", "one seed": ""}
WHEN = {
    "end": ("At the end of each", "Each arm at its own last evaluation, whatever it has paid."),
    "epoch": ("At equal epochs", "As the paper compares: an epoch of one arm may cost many of another's."),
    "cost": ("At equal cost", "Counted calls, each weighted by its cost."),
    "seconds": ("At equal time", "Epochs times the median epoch of a run; compilation is left out."),
}


def page(result: Mapping[str, Any], arms: Sequence[Arm]) -> str:
    """The whole document."""
    title = headline(result)
    parts = [
        f'<header><p class="run">{html.escape(" · ".join(a["name"] for a in result["arms"]))}</p>'
        f"<h1>{html.escape(title)}</h1></header>",
        arms_table(result),
        curves(result, arms),
        *(versus(result, axis) for axis in ("cost", "epoch", "seconds", "end")),
        untrained(result),
        pictures(arms),
        method(result),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{report_style.PLOT}{report_style.PAGE}{STYLE}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def headline(result: Mapping[str, Any]) -> str:
    """What is shown in a sentence: how many arms beat the one they are set against, at equal cost."""
    first = result["scores"][0]
    found = [r for r in result["comparisons"] if r["score"] == first["name"] and r["share"] == 1.0]
    where = "cost" if any(r["axis"] == "cost" for r in found) else "end"
    rows = [r for r in found if r["axis"] == where]
    when = "at equal cost" if where == "cost" else "at the end"
    if not rows:
        return f"One arm: {result['against']}"
    better = [r["arm"] for r in rows if r["verdict"] == "better"]
    if better:
        return f"Better than {result['against']} in {first['label']} {when}: {', '.join(better)}"
    if all(r["verdict"] == "one seed" for r in rows):
        return f"One seed each: nothing is shown of {', '.join(r['arm'] for r in rows)}"
    return f"Nothing is shown to be better than {result['against']} in {first['label']} {when}"


def arms_table(result: Mapping[str, Any]) -> str:
    """What each arm scores at its end and what it has cost."""
    rows = [
        [
            html.escape(arm["name"]),
            ", ".join(map(str, arm["seeds"])) if arm["trained"] else "not trained",
            str(arm["epochs"]),
            f"{arm['cost']:,.0f}",
            f"{arm['cost_per_epoch']:,.0f}" if arm["epochs"] else "–",
            f"{arm['picture']:,.0f}" if arm["picture"] else "–",
            duration(arm["seconds"]),
            *(statistics.shown(arm["scores"][s["name"]]) for s in result["scores"]),
        ]
        for arm in result["arms"]
    ]
    head = [
        "arm",
        "seeds",
        "epochs",
        "cost",
        "per epoch",
        "per picture",
        "time",
        *(html.escape(s["label"]) for s in result["scores"]),
    ]
    notes = "".join(lead(html.escape(note)) for note in result["notes"])
    said = f"Last evaluation of each run on {result['prompts']} prompts, mean over seeds."
    return section("Arms", lead(said), notes, table(head, rows, "Arms"))


def versus(result: Mapping[str, Any], axis: str) -> str:
    """The differences to the arm that is compared against, along one axis."""
    title, said = WHEN[axis]
    rows = [r for r in result["comparisons"] if r["axis"] == axis]
    names = [s for s in result["scores"] if any(r["score"] == s["name"] for r in rows)]
    body = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        for share in sorted({r["share"] for r in rows}):
            here = {r["score"]: r for r in rows if r["arm"] == arm and r["share"] == share}
            some = next(iter(here.values()), None)
            if some is not None:
                where = "" if some["at"] is None else f"{some['at']:,.0f}"
                body.append([html.escape(arm), where, *(cell(here[s["name"]]) for s in names)])
    if not body:
        return ""
    head = ["arm", AXES.get(axis, ""), *(html.escape(s["label"]) for s in names)]
    more = f"{said} Difference to {html.escape(result['against'])}; coloured where the interval excludes 0."
    return section(title, lead(more), table(head, body, title))


def cell(row: Mapping[str, Any]) -> str:
    """A difference with its interval; in words where nothing is shown."""
    words = compare_statistics.told(row)
    kind = KINDS[row["verdict"]]
    if kind:
        return f'<span class="{kind}">{words}</span>'
    return f"{words}<br><small>{compare_statistics.WORDS[row['verdict']].split(':')[0]}</small>"


def chosen(result: Mapping[str, Any], arms: Sequence[Arm]) -> list[Arm]:
    """The trained arms of a plot."""
    trained = [arm for arm in arms if arm.trained]
    first = result["scores"][0]["name"]
    by_score = sorted(trained, key=lambda arm: -statistics.mean(arm.last(first)))
    kept = {arm.name for arm in by_score[:MOST_LINES]}
    if result["against"] not in kept and any(arm.name == result["against"] for arm in trained):
        kept = {arm.name for arm in by_score[: MOST_LINES - 1]} | {result["against"]}
    return [arm for arm in trained if arm.name in kept]


def line(arm: Arm, score: str, axis: str, price: Mapping[str, float]) -> Line:
    """Mean over seeds where all have come, with the range of the seeds as band."""
    along = arm.runs[0].axis(axis, price)
    end = arm.end(axis, price)
    where = [float(x) for x in along if x <= end * (1 + 1e-9)]
    values = [np.nanmean(arm.at(score, axis, x, price), 1) for x in where]
    band = ([float(v.min()) for v in values], [float(v.max()) for v in values]) if len(arm.runs) > 1 else None
    return Line(arm.name, where, [float(v.mean()) for v in values], band=band, dots=True)


def plot(result: Mapping[str, Any], arms: Sequence[Arm], score: str, axis: str, size: tuple[int, int]) -> str:
    """One plot of a score along an axis."""
    price = result["costs"]["per_call"]
    lines = [line(arm, score, axis, price) for arm in chosen(result, arms)]
    label = next((s["label"] for s in result["scores"] if s["name"] == score), score)
    return report_plot.lines(
        lines,
        title=f"{label} by {AXES[axis]}",
        x_label=AXES[axis],
        y_label=label,
        width=size[0],
        height=size[1],
    )


def figure(result: Mapping[str, Any], arms: Sequence[Arm], score: str, axis: str) -> str:
    """The curves as an SVG file."""
    return alone(plot(result, arms, score, axis, FIGURE))


def alone(svg: str) -> str:
    """A plot of this size as a file that stands alone, light and dark."""
    opening, rest = svg.split(">", 1)
    size = f'xmlns="http://www.w3.org/2000/svg" width="{FIGURE[0]}" height="{FIGURE[1]}" '
    ground = '<rect class="ground" width="100%" height="100%" rx="10"/>'
    style = f"<style>{report_style.PLOT}{STYLE}</style>"
    return f"{opening.replace('<svg ', f'<svg {size}')}>{style}{ground}{rest}\n"


def curves(result: Mapping[str, Any], arms: Sequence[Arm]) -> str:
    """The first score and the first that nobody was trained on, along every axis."""
    if not chosen(result, arms):
        return ""
    scores = [result["scores"][0]["name"]]
    scores += [s["name"] for s in result["scores"] if not s["trained_on"]][:1]
    figures = "".join(
        f"<figure>{plot(result, arms, score, axis, (460, 300))}</figure>"
        for score in dict.fromkeys(scores)
        for axis in AXES
    )
    left = sum(arm.trained for arm in arms) - len(chosen(result, arms))
    more = f" {left} arms that end lower are left out." if left else ""
    return section(
        "Curves",
        lead(f"Mean over seeds; the band is their range.{more}"),
        f'<div class="plots">{figures}</div>',
    )


def untrained(result: Mapping[str, Any]) -> str:
    """The scores that no arm was trained on, by name."""
    names = [html.escape(s["label"]) for s in result["scores"] if not s["trained_on"]]
    if not names:
        return section("Rewards never trained on", lead("None was evaluated: name some in eval_rewards."))
    said = (
        f"No arm was trained on: {', '.join(names)}. Where these fall and the others rise, a judge is gamed."
    )
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in result["comparisons"]):
        here = [r for r in result["comparisons"] if r["arm"] == arm and r["axis"] == "end"]
        cells = [
            cell(r) for s in result["scores"] if not s["trained_on"] for r in here if r["score"] == s["name"]
        ]
        rows.append([html.escape(arm), *cells])
    body = table(["arm", *names], rows, "Rewards never trained on") if rows else ""
    return section("Rewards never trained on", lead(said), body)


def pictures(arms: Sequence[Arm]) -> str:
    """The first prompts as the first run of each arm draws them, on equal noise."""
    shown = [(arm.name, arm.runs[0]) for arm in arms if arm.runs[0].pictures is not None][:MOST_LINES]
    if not shown:
        return ""
    count = min(SHOWN, *(len(run.pictures) for _, run in shown if run.pictures is not None))
    items = []
    for i in range(count):
        shots = "".join(
            f"<figure>{report_pictures.img(run.pictures[i], name)}"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, run in shown
            if run.pictures is not None
        )
        said = html.escape(shown[0][1].prompts[i])
        items.append(f'<li><div class="shots">{shots}</div><p class="prompt">{said}</p></li>')
    return section(
        "Pictures",
        lead("The first prompts, not a selection; first seed."),
        f'<ul class="pairs">{"".join(items)}</ul>',
    )


def method(result: Mapping[str, Any]) -> str:
    """How it was counted."""
    costs = ", ".join(f"{name} {value:.3g}" for name, value in result["costs"]["per_call"].items())
    count = len(result["comparisons"])
    return section(
        "How to read it",
        lead(
            "Intervals are of 95 %: prompts are resampled, the spread of the seeds enters by Student's law, "
            "equal prompts and equal noise are paired, and equal seeds where both arms have the same. "
            f"The page holds {count} intervals; where nothing differs, one in twenty excludes 0."
        ),
        lead(
            f"Cost of a call in network calls: {html.escape(costs)} ({html.escape(result['costs']['from'])})."
        ),
        lead(
            "Between two evaluations a score is read from the straight line; beyond the last there is none. "
            "Evaluations themselves cost nothing here."
        ),
    )
