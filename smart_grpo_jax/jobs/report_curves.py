"""The curves of the report: from logged rows to plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from smart_grpo_jax.core import schema
from smart_grpo_jax.jobs import report_plot, statistics
from smart_grpo_jax.jobs.report_folder import Story, is_number
from smart_grpo_jax.jobs.report_plot import Line

SEARCH = re.compile(r"search/step_(\d+)/first$")
LAST_SHARE = 0.1
"""Part of the run, at its end, over which the bars of the search average."""
MOST_STEPS = 4
"""Searched steps that get a line of their own; more of them are drawn as their mean."""


def reward(story: Story) -> list[Line]:
    """Train reward with the search, and the bare policy's on held-out prompts with its paired interval."""
    searched = bool(search_steps(story))
    train = Line("training, with search" if searched else "training", *story.series("train/reward"))
    x, y = story.series("eval/reward")
    label = "bare policy, evaluation prompts"
    return [train, Line(label, x, y, band=_band(story, x, y), dots=True)]


def _band(story: Story, x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]] | None:
    """The 95 % interval of the paired difference to the base, around each evaluation's mean."""
    half = {}
    for e in story.evaluations:
        base = story.base
        if (
            base is not None
            and e.prompts == base.prompts
            and "reward" in e.scores
            and "reward" in base.scores
        ):
            half[float(e.epoch)] = statistics.interval(
                e.scores["reward"] - base.scores["reward"], base.prompts
            )[1]
    if not half or not all(np.isfinite(h) for h in half.values()):
        return None
    width = [half.get(epoch, 0.0) for epoch in x]
    return [v - h for v, h in zip(y, width, strict=True)], [v + h for v, h in zip(y, width, strict=True)]


def same_reward(story: Story) -> bool:
    """Whether training and evaluation add up the same scores with the same weights."""
    tables = (story.config.get("rewards", {}), story.config.get("eval_rewards", {}))
    trained, judged = ({k: w for k, v in t.items() if (w := schema.weight_of(v)) != 0} for t in tables)
    return trained == judged


def search_steps(story: Story) -> list[int]:
    """Indices of the steps that were searched at any time."""
    found = {
        int(m[1]) for row in story.rows for name in row if (m := SEARCH.match(name)) and is_number(row[name])
    }
    return sorted(found)


def search_gain(story: Story, step: int) -> tuple[list[float], list[float]]:
    """Epochs and gains of one step: mean candidate reward in the last round minus in the first."""
    x, y = [], []
    for row in story.rows:
        first, last = (row.get(f"search/step_{step}/{end}") for end in ("first", "last"))
        if is_number(first) and is_number(last):
            x.append(float(row["epoch"]))
            y.append(float(last) - float(first))  # type: ignore[arg-type]
    return x, y


def _judges(story: Story) -> list[Line]:
    names = {
        "eval/shapes": "graded",
        "eval/second/graded": "graded, 2nd judge",
        "eval/shapes/strict": "strict",
        "eval/second/strict": "strict, 2nd judge",
    }
    return [Line(label, *story.series(name), dots=True) for name, label in names.items()]


def _gap(story: Story) -> list[Line]:
    x, y = story.series("eval/judge_gap")
    return [Line("gap of the judges, minus epoch 0's", x, [v - y[0] for v in y], dots=True)]


def _groups(story: Story) -> list[Line]:
    return [
        Line("groups without any spread (share)", *story.series("train/zero_std_groups")),
        Line("spread inside groups (std)", *story.series("train/group_std")),
    ]


def _gains(story: Story) -> list[Line]:
    steps = search_steps(story)
    curves = {step: search_gain(story, step) for step in steps}
    if len(steps) <= MOST_STEPS:
        return [Line(f"step {step}", *curve) for step, curve in curves.items()]
    per_epoch: dict[float, list[float]] = {}
    for x, y in curves.values():
        for epoch, gain in zip(x, y, strict=True):
            per_epoch.setdefault(epoch, []).append(gain)
    epochs = sorted(per_epoch)
    return [Line(f"mean of {len(steps)} steps", epochs, [float(np.mean(per_epoch[e])) for e in epochs])]


def _named(label: str, name: str) -> Callable[[Story], list[Line]]:
    return lambda story: [Line(label, *story.series(name))]


CURVES: tuple[tuple[str, str, Callable[[Story], list[Line]], str], ...] = (
    (
        "Two judges",
        "score",
        _judges,
        "The second judge is of another kind and was never trained on: a rise that both share is hardly a "
        "trick on one of them.",
    ),
    (
        "Hacking meter",
        "difference",
        _gap,
        "Training judge minus second judge. A rise means that the policy pleases its own judge more than "
        "the other one.",
    ),
    ("Distance from the base", "KL", _named("KL to the base", "update/kl"), "How far the policy has moved."),
    (
        "Step of an update",
        "KL",
        _named("KL to the policy that acted", "update/approx_kl"),
        "How far one epoch's updates move it.",
    ),
    (
        "Groups",
        "share, std",
        _groups,
        "A group in which all rewards are equal teaches nothing; a shrinking spread teaches less.",
    ),
    (
        "Gain of the search over time",
        "reward",
        _gains,
        "Mean reward of the candidates in the last round minus the first.",
    ),
)
"""(title, y axis, lines, caption) of the small plots, in the order of the page."""


def hero(story: Story, wide: bool) -> str:
    """The plot of rewards, for a wide or a narrow window; empty without any."""
    series = reward(story)
    if not any(len(line.x) for line in series):
        return ""
    size = (820, 320) if wide else (400, 290)
    return report_plot.lines(
        series, title="Reward over epochs", y_label="reward", width=size[0], height=size[1]
    )


def small(story: Story) -> tuple[list[tuple[str, str, str]], list[str]]:
    """(title, svg, caption) of every plot that has data, and the titles of those that have none."""
    plots, absent = [], []
    for title, y_label, make, caption in CURVES:
        series = make(story)
        if any(len(line.x) for line in series):
            zero = title not in ("Two judges",)
            svg = report_plot.lines(series, title=title, y_label=y_label, zero=zero)
            plots.append((title, svg, caption))
        else:
            absent.append(title)
    steps = search_steps(story)
    if not steps:
        return plots, [*absent, "Gain of the search by step"]
    ends = [search_gain(story, step)[1] for step in steps]
    tail = [float(np.mean(y[-max(1, round(LAST_SHARE * len(y))) :])) for y in ends]
    svg = report_plot.bars(
        [str(step) for step in steps],
        tail,
        title="Gain of the search by step",
        x_label="searched step",
        y_label="reward",
    )
    caption = "The same gain for each searched step, over the last tenth of the epochs."
    return [*plots, ("Gain of the search by step", svg, caption)], absent


def cost(story: Story) -> str:
    """Reward against network calls, the axis on which two methods are compared; empty without them."""

    def against(name: str) -> tuple[list[float], list[float]]:
        found = [
            (float(row["nfe/velocity"]), float(row[name]))
            for row in story.rows
            if is_number(row.get(name)) and is_number(row.get("nfe/velocity"))
        ]
        return [x for x, _ in found], [y for _, y in found]

    series = [
        Line("training", *against("train/reward")),
        Line("bare policy", *against("eval/reward"), dots=True),
    ]
    if not any(len(line.x) for line in series):
        return ""
    return report_plot.lines(
        series, title="Reward against network calls", x_label="network calls in training", y_label="reward"
    )
