"""The page to look at: `report.html`, one file made from nothing but the run folder.

It needs no network and no script, may be made at any time (also of a run that is going, or was stopped),
and is the same bytes for the same folder.
"""

from __future__ import annotations

import html
from pathlib import Path

from PIL import Image

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import report_curves, report_folder, report_pictures, report_style, statistics
from smart_grpo_jax.jobs import report_sections as sections
from smart_grpo_jax.jobs.report_folder import Story
from smart_grpo_jax.runtime.files import write_atomic

NAME = "report.html"

SECTIONS = (
    sections.pictures,
    sections.headline,
    sections.curves,
    sections.movers,
    sections.tasks,
    sections.walk,
    sections.cost,
    sections.config,
    sections.machine,
)
"""The page from top to bottom; a section without anything to show is empty."""


def write(folder: Path) -> Path:
    """Builds the page of a run folder and returns its path; UserError where there is no run."""
    story = report_folder.read(Path(folder))
    path = Path(folder) / NAME
    write_atomic(path, page(story))
    return path


def page(story: Story) -> str:
    """The whole HTML document."""
    name = html.escape(story.name)
    style = report_style.PLOT + report_style.PAGE
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in story.notes)
    damaged = sections.section("Left out", notes) if notes else ""
    body = header(story) + "".join(make(story) for make in SECTIONS) + damaged
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: {html.escape(result(story))}</title><style>{style}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def header(story: Story) -> str:
    """The name of the run, its result in a sentence, what the other judge says, how far it is."""
    second = second_opinion(story)
    more = f'<p class="second">{html.escape(unbroken(second))}</p>' if second else ""
    return (
        f'<header><p class="run">{html.escape(story.name)}</p>'
        f"<h1>{html.escape(unbroken(result(story)))}</h1>{more}"
        f'<p class="status">{html.escape(status(story))}</p></header>'
    )


def unbroken(text: str) -> str:
    """The sentence with numbers, arrows and `held-out` that no line end tears apart."""
    text = text.replace("held-out", "held\u2011out")
    for sign in ("→", "±"):
        text = text.replace(f" {sign} ", f"\u00a0{sign}\u00a0")
    return text


OPENINGS = {"better": "", "worse": "Worse: ", "open": "No difference shown: "}


def result(story: Story) -> str:
    """The run in one sentence; it claims a difference only where the interval excludes 0."""
    rows, base = story.comparison(), story.base
    if rows and base is not None:
        change = statistics.change(rows[0])
        label = str(rows[0]["score"])
        label += "" if "reward" in label else " reward" if label == "graded" else " score"
        said, paired = change.words.split(", ", 1)
        where = f"{len(base.prompts)} {sections.prompts_kind(story)}"
        text = f"{OPENINGS[change.verdict]}{label} {said} on {where}, {paired}"
        return text[0].upper() + text[1:]
    if base is not None and base.scores:
        name = statistics.distinct(base.scores)[0]
        mean = statistics.shown(statistics.mean(base.scores[name]))
        label = statistics.HEADLINE.get(name, name)
        return f"Only the base is evaluated so far: {label} {mean} on {len(base.prompts)} prompts"
    return "No evaluation yet"


def second_opinion(story: Story) -> str:
    """Whether the judge that was never trained on agrees; empty where there is none."""
    row = next((r for r in story.comparison() if r["name"] == "second/graded"), None)
    if row is None:
        return ""
    change = statistics.change(row)
    opinion = {"better": "sees the gain, too", "worse": "sees a loss", "open": "shows no difference"}
    return f"A second judge, never trained on, {opinion[change.verdict]}: {change.words}."


def status(story: Story) -> str:
    """Method and progress."""
    search, train = story.config.get("search", {}), story.config.get("train", {})
    parts = []
    if search:
        searched = (
            search.get("rounds", 0) > 0 and search.get("steps") != "none" and search.get("members", 1) > 0
        )
        parts.append("Smart-GRPO" if searched else "Flow-GRPO (no search)")
    if "path" in story.config.get("model", {}):
        parts.append(f"model {Path(str(story.config['model']['path'])).name}")
    done, wanted = (story.rows[-1]["epoch"] if story.rows else 0), train.get("epochs")
    if wanted is None:
        parts.append(f"epoch {done}")
    elif done >= wanted:
        parts.append(f"finished after {done} epochs")
    else:
        parts.append(f"epoch {done} of {wanted}: still going, or stopped early")
    return " · ".join(parts)


def svg_curve(folder: Path) -> str:
    """The reward plot as an SVG file that stands alone, light and dark, for a README."""
    story = report_folder.read(Path(folder))
    svg = report_curves.hero(story, wide=True)
    if not svg:
        raise UserError(
            f"{folder}: got no train/reward or eval/reward in metrics.jsonl, wanted a row with one"
        )
    opening, rest = svg.split(">", 1)
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="820" height="320" ')
    ground = '<rect class="ground" width="100%" height="100%" rx="10"/>'
    return f"{opening}><style>{report_style.PLOT}</style>{ground}{rest}\n"


def before_after(folder: Path) -> Image.Image:
    """The first 8 evaluation prompts before and after, on equal noise, for a README."""
    return report_pictures.before_after(report_folder.read(Path(folder)))
