"""`--mode=compare RUN RUN …`: which method is better, at equal epochs, equal cost and equal time.

Every arm is set against one of them, at its end and at a quarter, a half and the whole of what both have
paid. Intervals: compare_statistics.py. Writes compare.html and compare.json; with --reference says whether
a run lies where such runs lie.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.jobs import compare_page, compare_reference, compare_runs, compare_statistics, statistics
from smart_grpo_jax.jobs.compare_runs import AXES, CALLS, Arm, Run
from smart_grpo_jax.runtime.files import storage, write_atomic, write_json
from smart_grpo_jax.runtime.progress import say, table

SHARES = (0.25, 0.5, 1.0)
"""Parts of what both arms have paid at which they are compared."""

COSTS = "costs.json"


def job(
    given: Sequence[str],
    *,
    runs: Sequence[Run] = (),
    against: str | None = None,
    costs: str | None = None,
    out: str | None = None,
    reference: str | None = None,
    results: str | None = None,
    expect: str | None = None,
) -> None:
    """Compare the given runs and those at hand, print, write. `reference` asks whether the runs lie inside a
    stored band; `expect` stores one, `results` stores the runs themselves, both as small text."""
    arms = compare_runs.load(given, runs)
    if results:
        write_results(Path(results), arms)
    if expect:
        compare_reference.write(Path(expect), arms)
        say(f"expected result of {len(arms[0].runs)} seeds: {expect}")
    if reference:
        for line in compare_reference.check(Path(reference), arms):
            say(line)
    if len(arms) == 1 and not out and (reference or expect or results):
        return
    price, origin = prices(costs, [*given, *([results] if results else [])])
    result = compare(arms, against, price, origin)
    say(text(result))
    folder = Path(out or "runs")
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", result)
    write_atomic(folder / "compare.html", compare_page.page(result, arms))
    say(f"look at {folder / 'compare.html'}")


def write_results(path: Path, arms: Sequence[Arm]) -> None:
    """The runs as a results file."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(compare_runs.pack(run) + "\n" for arm in arms for run in arm.runs))
    say(f"{sum(len(arm.runs) for arm in arms)} runs: {path}")


def prices(costs: str | None, given: Sequence[str]) -> tuple[dict[str, float], str]:
    """What a call costs, in network calls, and where that is from; unmeasured, networks alone are counted."""
    found = seconds_per_call(costs, given)
    if found is None:
        return dict(compare_runs.UNWEIGHTED), "not measured: network calls, a backward pass as two"
    seconds, origin = found
    return {name: seconds[name] / seconds["velocity"] for name in CALLS}, origin


def seconds_per_call(costs: str | None, given: Sequence[str]) -> tuple[dict[str, float], str] | None:
    """The seconds of a call as benchmarks/call_costs.py measured them: `--costs`, or costs.json beside the
    runs or above them."""
    places = [Path(costs)] if costs else []
    if not costs:
        parents = {p: None for g in given for p in [Path(g), *Path(g).parents][:4] if "*" not in str(p)}
        places = [place for p in parents if (place := p / COSTS).is_file()]
    if not places:
        return None
    try:
        table = json.loads(places[0].read_text(encoding="utf-8"))
        found = {name: float(table[name]) for name in CALLS}
        if found["velocity"] <= 0:
            raise ValueError("velocity is 0")
        return found, f"{places[0]}, {table.get('machine', '')}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--costs: {places[0]} has no costs ({type(error).__name__}: {error})") from None


def compare(
    arms: Sequence[Arm], against: str | None, price: Mapping[str, float], origin: str
) -> dict[str, Any]:
    """Everything that the page and the JSON say."""
    found = overview(arms, against, price, origin)
    base = next(arm for arm in arms if arm.name == found["against"])
    scores = [score["name"] for score in found["scores"]]
    rows = [row for arm in arms if arm is not base for row in versus(arm, base, scores, price)]
    return found | {"comparisons": rows, "notes": notes(arms)}


def overview(
    arms: Sequence[Arm], against: str | None, price: Mapping[str, float], origin: str
) -> dict[str, Any]:
    """What is said of each arm by itself; comparisons are dear, and not everyone wants them all."""
    names = [arm.name for arm in arms]
    if against is not None and against not in names:
        raise UserError(f'--against: got "{against}" ({nearest(against, names)})')
    base = next(arm for arm in arms if arm.name == (against or names[0]))
    scores = common_scores(arms)
    return {
        "against": base.name,
        "prompts": len(base.runs[0].prompts),
        "scores": [
            {"name": s, "label": statistics.HEADLINE.get(s, s), "trained_on": is_trained_on(arms, s)}
            for s in scores
        ],
        "costs": {"per_call": dict(price), "from": origin},
        "arms": [summary(arm, scores, price) for arm in arms],
    }


def common_scores(arms: Sequence[Arm]) -> list[str]:
    """Scores that all arms have; one that repeats another everywhere is left out."""
    shared = [s for s in arms[0].scores() if all(s in arm.scores() for arm in arms)]
    if not shared:
        raise UserError("--mode=compare: got runs without a score in common")
    return statistics.distinct({s: np.concatenate([arm.last(s) for arm in arms]) for s in shared})


def is_trained_on(arms: Sequence[Arm], score: str) -> bool:
    """Whether any arm was trained on a score."""
    return any(compare_runs.trained_on(arm.runs[0].config, score) for arm in arms if arm.trained)


def summary(arm: Arm, scores: Sequence[str], price: Mapping[str, float]) -> dict[str, Any]:
    """One arm by itself: means at its end, what it cost."""
    last = [run.points[-1] for run in arm.runs]
    epochs = max(1, last[0].epoch)
    cost = sum(float(run.axis("cost", price)[-1]) for run in arm.runs) / len(arm.runs)
    seconds = sum(point.seconds for point in last) / len(last)
    return {
        "name": arm.name,
        "seeds": arm.seeds,
        "trained": arm.trained,
        "epochs": last[0].epoch,
        "calls": {name: int(sum(p.calls.get(name, 0) for p in last) / len(last)) for name in CALLS},
        "cost": cost,
        "cost_per_epoch": cost / epochs,
        "picture": compare_runs.weighted(arm.runs[0].picture, price),
        "seconds": seconds,
        "machine": arm.runs[0].machine,
        "scores": {s: statistics.mean(arm.last(s)) for s in scores},
    }


def versus(arm: Arm, base: Arm, scores: Sequence[str], price: Mapping[str, float]) -> list[dict[str, Any]]:
    """All comparisons of two arms: at their ends, and along each axis as far as both have come."""
    rows = [row(arm, base, score, "end", 1.0, price) for score in scores]
    along = [axis for axis in AXES if common(arm, base, axis, price) > 0]
    return rows + [
        row(arm, base, score, axis, share, price) for axis in along for share in SHARES for score in scores
    ]


def common(arm: Arm, base: Arm, axis: str, price: Mapping[str, float]) -> float:
    """How far two arms have both come along an axis; 0 where one is not trained."""
    return min(a.end(axis, price) for a in (arm, base)) if arm.trained and base.trained else 0.0


def row(
    arm: Arm, base: Arm, score: str, axis: str, share: float, price: Mapping[str, float]
) -> dict[str, Any]:
    """One comparison: means, difference, interval, verdict; at the ends, or at a share of what both paid."""
    where = None
    if axis == "end":
        one, other = arm.last(score), base.last(score)
    else:
        where = share * common(arm, base, axis, price)
        one, other = (a.at(score, axis, where, price) for a in (arm, base))
    paired = arm.seeds == base.seeds and arm.trained and base.trained
    found = compare_statistics.difference(
        one, other, base.runs[0].prompts, paired=paired, repeated=(arm.trained, base.trained)
    )
    return {
        "arm": arm.name,
        "against": base.name,
        "score": score,
        "axis": axis,
        "share": share,
        "at": where,
        "mean": statistics.mean(one),
        "against_mean": statistics.mean(other),
        **found._asdict(),
        "seeds": list(found.seeds),
        "verdict": found.verdict,
    }


def notes(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know before believing."""
    said = []
    machines = sorted({run.machine for arm in arms for run in arm.runs if run.trained})
    if len(machines) > 1:
        said.append(
            f"The runs were made on different machines ({'; '.join(machines)}): do not compare times."
        )
    if any(len(arm.runs) < 2 for arm in arms if arm.trained):
        said.append(
            "An arm with one seed has an interval over prompts alone; it says nothing of a repetition."
        )
    lengths = {arm.name: {run.points[-1].epoch for run in arm.runs} for arm in arms}
    for name, ends in lengths.items():
        if len(ends) > 1:
            said.append(
                f"The runs of {name} end at different epochs ({sorted(ends)}); some are not finished."
            )
    return said


def text(result: Mapping[str, Any]) -> str:
    """The table for the terminal: the first score, at the end and at equal cost."""
    first = result["scores"][0]
    cells = []
    for arm in result["arms"]:
        found = [r for r in result["comparisons"] if r["arm"] == arm["name"] and r["score"] == first["name"]]
        whole = {r["axis"]: r for r in found if r["share"] == 1.0}
        cells.append(
            [
                arm["name"],
                str(len(arm["seeds"])) if arm["trained"] else "–",
                str(arm["epochs"]),
                f"{arm['cost']:.3g}",
                statistics.shown(arm["scores"][first["name"]]),
                *(said(whole[axis]) if axis in whole else "" for axis in ("end", "cost")),
            ]
        )
    head = [
        "arm",
        "seeds",
        "epochs",
        "cost",
        first["label"],
        f"against {result['against']}, at the end",
        "at equal cost",
    ]
    return table(cells, head)


def said(row: Mapping[str, Any]) -> str:
    """`+0.031 [+0.010, +0.052] better`."""
    words = compare_statistics.WORDS[row["verdict"]].split(":")[0]
    return f"{compare_statistics.told(row)} {words}"
