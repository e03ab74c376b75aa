"""Runs as a comparison reads them: what each evaluation scored on each prompt, and what was paid by then.

A run comes from its folder, or from a line of a results file (`pack`): the same without weights and pictures.
Runs of one config and several seeds are an arm. Costs are counted calls (`nfe/*`) times what a call costs.
"""

from __future__ import annotations

import base64
import dataclasses
import glob
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import compare_settings, report_folder, statistics
from smart_grpo_jax.jobs.report_folder import Story, is_number

CALLS = ("velocity", "backward", "decode", "reward")
"""What is counted and paid for."""

UNWEIGHTED = {"velocity": 1.0, "backward": 2.0, "decode": 0.0, "reward": 0.0}
"""Costs of a call where none were measured: network evaluations, a backward pass as two of them."""

MANY = 4
"""Images per prompt from which on the best of them is a method of its own."""

DIGITS = 4
"""Decimals of packed scores; scores below 0.1 have more, so that four digits are left of them, too."""

AXES = {"epoch": "epoch", "cost": "weighted calls", "seconds": "seconds of training"}
"""What scores are compared at."""


def weighted(calls: Mapping[str, int], price: Mapping[str, float]) -> float:
    """Calls in the unit of one network call."""
    return sum(price[name] * calls.get(name, 0) for name in CALLS)


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation: scores per prompt by name, and epochs, calls and seconds of training before it."""

    epoch: int
    scores: Mapping[str, Float[np.ndarray, " p"]]
    calls: Mapping[str, int]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One training; `pictures` are those of its last evaluation, if its folder is at hand."""

    arm: str
    seed: int
    config: dict[str, Any]
    machine: str
    prompts: list[str]
    points: list[Point]
    pictures: UInt8[np.ndarray, "n h w 3"] | None = None
    picture: Mapping[str, int] = dataclasses.field(default_factory=dict)  # calls of an evaluated one

    @property
    def trained(self) -> bool:
        """Whether a repetition with another seed would differ."""
        return self.points[-1].epoch > 0

    def axis(self, name: str, price: Mapping[str, float]) -> Float[np.ndarray, " points"]:
        """Where on an axis each evaluation lies."""
        where = {
            "epoch": lambda point: point.epoch,
            "cost": lambda point: weighted(point.calls, price),
            "seconds": lambda point: point.seconds,
        }[name]
        return np.asarray([where(point) for point in self.points], np.float64)

    def at(self, score: str, where: float, along: Float[np.ndarray, " points"]) -> Float[np.ndarray, " p"]:
        """The score of each prompt at a place between two evaluations, on the straight line between them."""
        values = np.stack([point.scores[score] for point in self.points])
        right = int(np.clip(np.searchsorted(along, where), 1, max(1, len(along) - 1)))
        if len(along) == 1 or where >= along[-1]:
            return values[-1]
        left = right - 1
        share = (where - along[left]) / (along[right] - along[left]) if along[right] > along[left] else 0.0
        return (1 - share) * values[left] + share * values[right]


@dataclasses.dataclass(frozen=True)
class Arm:
    """The runs of one config, one per seed, in the order of their seeds."""

    name: str
    runs: list[Run]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return [run.seed for run in self.runs]

    @property
    def trained(self) -> bool:
        """Whether a repetition with another seed would differ."""
        return self.runs[0].trained

    def end(self, axis: str, price: Mapping[str, float]) -> float:
        """How far every run of the arm has come."""
        return min(float(run.axis(axis, price)[-1]) for run in self.runs)

    def at(self, score: str, axis: str, where: float, price: Mapping[str, float]) -> Float[np.ndarray, "s p"]:
        """Scores [seed, prompt] at a place on an axis."""
        return np.stack([run.at(score, where, run.axis(axis, price)) for run in self.runs])

    def last(self, score: str) -> Float[np.ndarray, "s p"]:
        """Scores [seed, prompt] of each run's last evaluation."""
        return np.stack([run.points[-1].scores[score] for run in self.runs])

    def scores(self) -> list[str]:
        """The scores that all evaluations of all runs have, headline scores first; parts are left out."""
        found = [set(point.scores) for run in self.runs for point in run.points]
        return statistics.order(sorted(name for name in set.intersection(*found) if is_whole(name)))


def load(given: Sequence[str], runs: Iterable[Run] = ()) -> list[Arm]:
    """Arms of the runs at hand and of run folders, globs and results files, in the order in which they are
    named."""
    runs = list(runs)
    for pattern in given:
        paths = sorted(glob.glob(pattern)) or [pattern]
        for path in map(Path, paths):
            runs += unpack(path) if path.is_file() else from_folder(path)
    if not runs:
        raise UserError("--mode=compare: got no runs, wanted run folders: --mode=compare runs/a runs/b")
    return arms(runs)


def from_folder(path: Path) -> list[Run]:
    """The run of a folder; with several images per prompt also the best of 2, 4, 8 … and of all of them."""
    story = report_folder.read(path)
    evaluations = [e for e in story.evaluations if e.scores]
    if not evaluations:
        raise UserError(f"{path}: has no evaluation yet, wanted eval/<epoch>.npz")
    rows = {row["epoch"]: row for row in story.rows}
    pace = epoch_seconds(story)
    seed = int(story.config.get("seed", 0))
    name = arm_name(Path(path))

    def run(label: str, fold: Callable[..., Any], cost: int = 1) -> Run:
        points = [
            Point(e.epoch, fold(e.scores), calls_of(rows.get(e.epoch, {})), pace * e.epoch)
            for e in evaluations
        ]
        last, picture = evaluations[-1], {call: cost * count for call, count in _picture(path).items()}
        return Run(label, seed, story.config, machine(story), last.prompts, points, last.images, picture)

    images = next(iter(evaluations[-1].scores.values())).shape[1]
    found = [run(name, means)]
    if images >= MANY and evaluations[-1].epoch == 0 and "reward" in evaluations[-1].scores:
        counts = [2**i for i in range(1, images.bit_length()) if 2**i < images]
        found += [run(f"{name}_best_of_{n}", partial(best, count=n), n) for n in (*counts, images)]
    return found


def _picture(path: Path) -> dict[str, int]:
    """The calls of one evaluated picture, where `--mode=experiment` has left them."""
    try:
        return dict(json.loads((path / "price.json").read_text(encoding="utf-8"))["picture"])
    except (OSError, ValueError, KeyError):
        return {}


def means(scores: Mapping[str, np.ndarray]) -> dict[str, Float[np.ndarray, " p"]]:
    """Mean over the images of a prompt."""
    return {name: statistics.per_prompt_mean(values) for name, values in scores.items()}


def best(scores: Mapping[str, np.ndarray], count: int) -> dict[str, Float[np.ndarray, " p"]]:
    """Every score of the image whose reward is the highest of `count`, as a mean over what a prompt's images
    make of such lots."""
    lots = lambda values: values[:, : values.shape[1] // count * count].reshape(len(values), -1, count)
    reward = lots(scores["reward"])
    chosen = np.where(np.isfinite(reward), reward, -np.inf).argmax(-1)[..., None]
    picked = lambda values: np.take_along_axis(lots(values).astype(np.float64), chosen, -1)[..., 0]
    return {name: statistics.per_prompt_mean(picked(values)) for name, values in scores.items()}


def calls_of(row: Mapping[str, Any]) -> dict[str, int]:
    """The counted calls of a logged row."""
    return {name: int(row[key]) for name in CALLS if is_number(row.get(key := f"nfe/{name}"))}


def epoch_seconds(story: Story) -> float:
    """The median epoch of a run: what was compiled in the first, or slept through in another, is left out."""
    epochs, seconds = (np.asarray(values) for values in story.series("wall/train_seconds"))
    if len(epochs) < 2:
        return 0.0
    return float(np.median(np.diff(seconds) / np.diff(epochs)))


def machine(story: Story) -> str:
    """The devices of a run, in words."""
    devices = [str(d).partition(": ")[2] or str(d) for d in story.env.get("devices", [])]
    kinds = ", ".join(f"{devices.count(kind)} × {kind}" for kind in sorted(set(devices)))
    cores = story.env.get("cpu_count")
    return f"{kinds or 'unknown'}, {cores} CPU cores" if cores else kinds


def arm_name(path: Path) -> str:
    """`…/smart_grpo/seed3`, `…/smart_grpo/3` and `…/smart_grpo-s3` are runs of `smart_grpo`."""
    path = path.absolute()
    if re.fullmatch(r"(seed|s)?[-_]?\d+", path.name):
        return path.parent.name
    return re.sub(r"[-_](seed|s)[-_]?\d+$", "", path.name)


def arms(runs: Iterable[Run]) -> list[Arm]:
    """Runs by arm; an arm is one config, its seeds are distinct, all runs are judged on the same prompts."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    grouped = [Arm(name, sorted(group, key=lambda run: run.seed)) for name, group in found.items()]
    for arm in grouped:
        _check_arm(arm)
    prompts = grouped[0].runs[0].prompts
    for arm in grouped:
        for run in arm.runs:
            if run.prompts != prompts:
                raise UserError(
                    f"{run.arm}: was evaluated on other prompts than {grouped[0].name}, wanted the same "
                    "eval.source and eval.prompts"
                )
    return grouped


def _check_arm(arm: Arm) -> None:
    if len(set(arm.seeds)) < len(arm.seeds):
        raise UserError(f"{arm.name}: got the seeds {arm.seeds}, wanted each once (or other folder names)")
    first = compare_settings.settings(arm.runs[0].config)
    for run in arm.runs[1:]:
        other = compare_settings.settings(run.config)
        differ = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
        if differ:
            name = differ[0]
            raise UserError(
                f"{arm.name}: seed {run.seed} has {name} = {other.get(name)!r}, seed {arm.seeds[0]} has "
                f"{first.get(name)!r}; wanted one config in all runs of an arm"
            )


def is_whole(score: str) -> bool:
    """A reward or a headline score, not a part of one."""
    return score in statistics.HEADLINE or "/" not in score


def trained_on(config: Mapping[str, Any], score: str) -> bool:
    """Whether a score is, or is a part of, a reward that the run was trained with."""
    rewards = config.get("rewards", {"shapes": 1.0})
    names = {name for name, entry in rewards.items() if schema.weight_of(entry) != 0}
    return score == "reward" or score.split("/")[0] in names


def pack(run: Run) -> str:
    """A run as one line of a results file: settings that are not the defaults, and its evaluations."""
    points = [
        {
            "epoch": point.epoch,
            "calls": dict(point.calls),
            "seconds": round(point.seconds, 3),
            "scores": {name: _packed(v) for name, v in point.scores.items() if is_whole(name)},
        }
        for point in run.points
    ]
    return json.dumps(
        {
            "arm": run.arm,
            "seed": run.seed,
            "machine": run.machine,
            "config": compare_settings.stored(run.config),
            "picture": dict(run.picture),
            "prompts": _text(zlib.compress("\n".join(run.prompts).encode(), 9)),
            "evaluations": points,
        }
    )


def unpack(path: Path) -> list[Run]:
    """The runs of a results file."""
    try:
        return [_unpacked(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise UserError(f"{path}: is no results file ({type(error).__name__}: {error})") from None


def _unpacked(line: Mapping[str, Any]) -> Run:
    points = [
        Point(e["epoch"], {k: _scores(v) for k, v in e["scores"].items()}, e["calls"], e["seconds"])
        for e in line["evaluations"]
    ]
    prompts = zlib.decompress(base64.b64decode(line["prompts"])).decode().split("\n")
    config, picture = _nested(line["config"]), line["picture"]
    return Run(line["arm"], line["seed"], config, line["machine"], prompts, points, picture=picture)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as a nested dict."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parts, last = name.split(".")
        node = nested
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


MISSING = np.iinfo(np.int32).min
"""The packed form of a score that did not come."""


def _packed(values: Float[np.ndarray, " p"]) -> str:
    """Whole numbers of 10^-DIGITS; of a finer unit where the text begins with its decimals: `7:…`."""
    known = np.isfinite(values)
    size = float(np.abs(values[known]).max(initial=0))
    digits = DIGITS if not 0 < size < 0.1 else DIGITS - 1 - math.floor(math.log10(size))
    whole = np.where(known, np.round(np.where(known, values, 0) * 10.0**digits), MISSING).astype("<i4")
    return ("" if digits == DIGITS else f"{digits}:") + _text(zlib.compress(whole.tobytes(), 9))


def _scores(text: str) -> Float[np.ndarray, " p"]:
    digits, _, data = text.rpartition(":")
    whole = np.frombuffer(zlib.decompress(base64.b64decode(data)), "<i4")
    return np.where(whole == MISSING, np.nan, whole / 10.0 ** int(digits or DIGITS))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
