"""The sections of the report: each is a function of the story to a piece of HTML, empty or a plain
sentence where the run has nothing to show."""

from __future__ import annotations

import base64
import collections
import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import report_curves, report_pictures, speed_text, statistics
from smart_grpo_jax.jobs.report_folder import Story
from smart_grpo_jax.worlds.shapes import grammar

SHOWN = 4
"""Prompts in each of the lists of most improved and most damaged."""

COSTS = {
    "nfe/velocity": "network calls",
    "nfe/backward": "backward passes",
    "nfe/decode": "decodes",
    "nfe/reward": "reward calls",
    "nfe/images": "finished images",
}


def section(title: str, *parts: str) -> str:
    """A titled card."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>"


def lead(text: str) -> str:
    """A muted sentence under a title."""
    return f'<p class="lead">{text}</p>'


def absent(text: str) -> str:
    """The sentence that stands where something is missing."""
    return f'<p class="absent">{text}</p>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], label: str, changed: Sequence[bool] = ()
) -> str:
    """A table in a box that scrolls by itself; cells are HTML, the first of a row is its header.

    All other columns are numbers, right-aligned, unless `changed` is given: then they are text, and
    marked rows are highlighted.
    """
    kind = "" if len(changed) else ' class="n"'
    top = f'<th scope="col">{head[0]}</th>' + "".join(f'<th scope="col"{kind}>{h}</th>' for h in head[1:])
    body = []
    for i, row in enumerate(rows):
        mark = ' class="changed"' if len(changed) and changed[i] else ""
        cells = "".join(f"<td{kind}>{cell}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{row[0]}</th>{cells}</tr>')
    said = html.escape(label, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{said}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def prompts_kind(story: Story) -> str:
    """`held-out prompts` where the run's config proves it, else `evaluation prompts`."""
    source = story.config.get("eval", {}).get("source", "")
    return "held-out prompts" if source in ("shapes:heldout", "shapes:combinations") else "evaluation prompts"


def pictures(story: Story) -> str:
    """Before and after on equal noise."""
    base, tuned = story.base, story.tuned
    if base is None or not len(base.images):
        return section("Pictures", _sheets(story))
    count = min(len(base.images), len(tuned.images)) if tuned else len(base.images)
    name = base.strict()
    marks = f" ✓ right, ✗ wrong by <code>{html.escape(name)}</code>." if name else ""
    said = (
        f"The first {count} {prompts_kind(story)}, not a selection. Both pictures of a pair start from the "
        f"same noise; after is epoch {tuned.epoch}, without any search.{marks}"
        if tuned
        else f"The first {count} {prompts_kind(story)} before any training; no later evaluation is "
        f"stored yet.{marks}"
    )
    items = "".join(report_pictures.pair(base, tuned, i) for i in range(count))
    return section("Before and after" if tuned else "Before", lead(said), f'<ul class="pairs">{items}</ul>')


def _sheets(story: Story) -> str:
    """The sample sheets as they are, where no evaluation is stored."""
    if not story.samples:
        return absent("No pictures are stored in this run folder yet.")
    sheets = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(data).decode()}" '
        f'alt="Sample sheet of epoch {epoch}"><figcaption>epoch {epoch}</figcaption></figure>'
        for epoch, data in story.samples
    )
    return f'<div class="sheets">{sheets}</div>'


def headline(story: Story) -> str:
    """The table of scores: base, tuned, paired difference."""
    pair, base = story.pair(), story.base
    if pair is None:
        if base is None:
            return section("Scores", absent("No evaluation of the base is stored yet."))
        names = statistics.distinct(base.scores)
        rows = [
            [html.escape(statistics.HEADLINE.get(n, n)), statistics.shown(statistics.mean(base.scores[n]))]
            for n in names
        ]
        return section("Scores", lead("The base alone."), table(["score", "base"], rows, "Scores"))
    rows = []
    for row in story.comparison():
        verdict = statistics.change(row).verdict
        words = statistics.signed(float(row["difference"]), float(row["half_width"]))
        kind = {"better": "right", "worse": "wrong", "open": ""}[verdict]
        cells = [
            statistics.shown(float(row["base"])),
            statistics.shown(float(row["tuned"])),
            f'<span class="{kind}">{words}</span>',
        ]
        rows.append([html.escape(str(row["score"])), *cells])
    seeds = next(iter(pair[0].scores.values())).shape[1]
    said = (
        f"{len(pair[0].prompts)} {prompts_kind(story)} × {seeds} seed{'s' * (seeds > 1)}, equal noise, the "
        f"last evaluation (epoch {pair[1].epoch}), not the best one. ± is the 95 % interval over prompts; it "
        "does not cover a repetition of the training. Coloured where the interval excludes 0."
    )
    head = ["score", "base", "tuned", "paired difference"]
    return section("Scores", lead(said), table(head, rows, "Scores of base and tuned policy"))


def curves(story: Story) -> str:
    """All plots over epochs."""
    small, missing = report_curves.small(story)
    wide, narrow = (report_curves.hero(story, wide) for wide in (True, False))
    parts = []
    if wide:
        note = (
            "The band is the 95 % interval of the paired difference to the base. Training samples with "
            "noise, on training prompts and, where the search is on, with its help; the evaluation sees the "
            "policy alone."
        )
        if story.config and not report_curves.same_reward(story):
            note += " Training and evaluation add up different rewards here, so compare slopes, not heights."
        parts.append(
            f'<figure class="hero"><h3>Reward</h3><div class="wide">{wide}</div>'
            f'<div class="narrow">{narrow}</div><figcaption>{note}</figcaption></figure>'
        )
    plots = "".join(
        f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"
        for title, svg, caption in small
    )
    parts.append(f'<div class="plots">{plots}</div>' if plots else "")
    if missing:
        parts.append(
            absent(f"Not drawn, because the log has no values for it: {', '.join(missing).lower()}.")
        )
    return section("Curves", *parts)


def movers(story: Story) -> str:
    """The prompts that gained and lost most, by the first score of the table."""
    pair, rows = story.pair(), story.comparison()
    if pair is None or not rows:
        return ""
    base, tuned = pair
    name = str(rows[0]["name"])
    before, after = (statistics.per_prompt_mean(e.scores[name]) for e in pair)
    difference = np.nan_to_num(after - before)
    stored = np.arange(len(difference)) < min(len(base.images), len(tuned.images))
    rank = np.lexsort((~stored, -difference))
    better = [i for i in rank if difference[i] > 0]
    rank = np.lexsort((~stored, difference))
    worse = [i for i in rank if difference[i] < 0]

    def listed(title: str, found: Sequence[int]) -> str:
        if not found:
            return f"<h3>{title}</h3>" + absent("None.")
        items = "".join(
            report_pictures.pair(base, tuned, i, f"{before[i]:.2f} → {after[i]:.2f}") for i in found[:SHOWN]
        )
        return f'<h3>{title}</h3><ul class="pairs">{items}</ul>'

    equal = len(difference) - len(better) - len(worse)
    said = (
        f"By the score “{html.escape(str(rows[0]['score']))}”: {len(better)} prompts rose, {len(worse)} "
        f"fell, {equal} stayed equal. Pictures are stored for the first {int(stored.sum())} prompts only."
    )
    return section(
        "Prompts that changed most", lead(said), listed("Improved", better), listed("Damaged", worse)
    )


def tasks(story: Story) -> str:
    """Accuracy per task family of the shapes world; nothing for other prompts."""
    base = story.base
    if base is None:
        return ""
    try:
        kinds = [grammar.parse(prompt).task for prompt in base.prompts]
    except UserError:
        return ""
    evaluations = [base, story.tuned] if story.tuned else [base]
    names = [n for n in ("shapes/strict", "second/strict") if all(n in e.scores for e in evaluations)]
    if not names:
        return ""
    size = collections.Counter(kinds)
    rows = []
    for task in (t for t in grammar.TASKS if size[t]):
        mask = np.array([kind == task for kind in kinds])
        cells = [f"{statistics.mean(e.scores[n][mask]):.0%}" for n in names for e in evaluations]
        rows.append([task.replace("_", " "), str(size[task]), *cells])
    labels = {"shapes/strict": "training judge", "second/strict": "second judge"}
    when = ["base", "tuned"][: len(evaluations)]
    head = ["task", "prompts", *(f"{labels[n]}, {w}" for n in names for w in when)]
    said = "Share of pictures that are right in everything the prompt says (strict score)."
    return section("Accuracy by task", lead(said), table(head, rows, "Accuracy by task"))


def walk(story: Story) -> str:
    """Figure 3 of the paper, for this model."""
    if story.walk is None:
        return ""
    said = (
        "What one step from each state on the way would give, without and with the search, from equal noise."
    )
    return section("Along the rollout", lead(said), report_pictures.walk_table(story.walk))


def cost(story: Story) -> str:
    """What the run has cost so far."""
    rows = [
        [label, f"{int(total):,}"] for name, label in COSTS.items() if (total := story.last(name)) is not None
    ]
    seconds, epochs = story.last("wall/train_seconds"), story.rows[-1]["epoch"] if story.rows else 0
    if seconds is not None:
        rows.append(["time of training", duration(seconds)])
        rows += [["time of an epoch", duration(seconds / epochs)]] if epochs else []
    timed = next((row for row in reversed(story.rows) if "wall/flops_per_second" in row), {})
    rows += [[what, html.escape(value)] for what, value in speed_text.rows(timed)]
    evaluating = story.series("wall/eval_seconds")[1]
    if evaluating:
        rows.append([f"time of {len(evaluating)} evaluations", duration(sum(evaluating))])
    if not rows:
        return section("Cost", absent("The log holds no counts yet."))
    plot = report_curves.cost(story)
    figure = (
        f"<figure><h3>Reward against cost</h3>{plot}<figcaption>Two runs compare fairly at equal calls."
        "</figcaption></figure>"
        if plot
        else ""
    )
    body = f'<div class="plots"><div>{table(["what", "so far"], rows, "Cost of the run")}</div>{figure}</div>'
    return section("Cost", lead("Evaluation is not counted in the calls."), body)


def duration(seconds: float) -> str:
    """42 s, 7 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def config(story: Story) -> str:
    """Every setting; those that differ from the defaults come first and are marked."""
    if not story.config:
        return section("Settings", absent("config.json is missing."))
    defaults = dict(schema.flatten(schema.to_dict(Config())))
    values = dict(schema.flatten(story.config))
    changed = [name for name, value in values.items() if name not in defaults or defaults[name] != value]

    def rows(names: Sequence[str]) -> list[list[str]]:
        said = lambda known, name: f"<code>{html.escape(json.dumps(known[name], ensure_ascii=False))}</code>"
        return [
            [f"<code>{html.escape(n)}</code>", said(values, n), said(defaults, n) if n in defaults else "—"]
            for n in names
        ]

    head = ["field", "value", "default"]
    first = (
        table(head, rows(changed), "Changed settings", [True] * len(changed))
        if changed
        else absent("All settings are the defaults.")
    )
    rest = table(head, rows(list(values)), "All settings", [n in changed for n in values])
    more = f"<details><summary>All {len(values)} settings</summary>{rest}</details>"
    return section("Settings", lead("What differs from the defaults."), first, more)


def machine(story: Story) -> str:
    """Versions, devices, command."""
    parts = [_environment(story.env) if story.env else absent("env.json is missing.")]
    if story.command:
        parts.append(f'<h3>Command</h3><pre tabindex="0">{html.escape(story.command)}</pre>')
    return section("Machine and command", *parts)


def _environment(env: dict[str, Any]) -> str:
    kinds = collections.Counter(
        str(device).partition(": ")[2] or str(device) for device in env.get("devices", [])
    )
    found = {
        "devices": ", ".join(f"{n} × {kind}" for kind, n in kinds.items()),
        "platform": env.get("platform"),
        "processes": env.get("processes"),
        "CPU cores": env.get("cpu_count"),
        "Python": env.get("python"),
        **{name: version for name, version in (env.get("versions") or {}).items()},
        "git": env.get("git"),
    }
    rows = [[html.escape(str(k)), f"<code>{html.escape(str(v))}</code>"] for k, v in found.items() if v]
    return table(["part", "value"], rows, "Versions and machine", [False] * len(rows))
