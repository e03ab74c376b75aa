"""Figures and numbers of the docs are those of their logs."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import compare, compare_runs
from tests.jobs.made_runs import arm, made, save

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = runpy.run_path(str(DOCS / "make_figures.py"))

PAGE = """# Page

The mean is <!-- made value trial.jsonl plain shapes -->0.1<!-- end -->, the difference
<!-- made difference trial.jsonl better plain shapes cost --><!-- end -->,
<!-- made verdict trial.jsonl better plain shapes end --><!-- end -->.

<!-- made table trial.jsonl plain epoch --><!-- end -->
<!-- made figure trial.jsonl second/graded cost --><!-- end -->
"""


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    (folder / "results").mkdir(parents=True)
    for name, gain in (("plain", 0.1), ("better", 0.2)):
        arm(tmp_path, name, gain=gain, seeds=range(3))
    runs = compare_runs.load([f"{tmp_path}/plain/*", f"{tmp_path}/better/*"])
    compare.write_results(folder / "results" / "trial.jsonl", runs)
    (folder / "page.md").write_text(PAGE)
    (folder / "other.md").write_text("nothing made here\n")
    return folder


def write(docs):
    for path, content in FIGURES["everything"](docs).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)


def test_the_docs_agree_with_their_logs():
    made = FIGURES["everything"](DOCS)
    for path, content in made.items():
        assert path.is_file() and path.read_text(encoding="utf-8") == content, (
            f"{path.name} is stale; run: python docs/make_figures.py"
        )
    assert not FIGURES["orphans"](DOCS, made)


def test_numbers_tables_and_figures_are_filled_in_and_stay_as_they_are(docs):
    write(docs)
    text = (docs / "page.md").read_text()
    assert "-->0.1<!--" not in text and "better<!-- end -->" in text
    assert "| plain | 3 | 4 |" in text and "+0." in text
    assert "(figures/trial-second-graded-cost.svg)" in text
    svg = (docs / "figures" / "trial-second-graded-cost.svg").read_text()
    assert svg.startswith("<svg xmlns=") and "<script" not in svg and svg.count("polyline") == 2
    assert FIGURES["everything"](docs)[docs / "page.md"] == text
    assert docs / "other.md" not in FIGURES["everything"](docs)


def test_the_readme_beside_the_docs_is_filled_in_too(docs):
    readme = docs.parent / "README.md"
    readme.write_text("It ended at <!-- made value trial.jsonl plain shapes --><!-- end -->.\n")
    write(docs)
    assert re.search(r"shapes -->\d\.\d{3}<!-- end -->\.", readme.read_text())


def test_totals_are_the_sums_over_all_runs_of_a_file(docs):
    (docs / "results" / "again.jsonl").write_text((docs / "results" / "trial.jsonl").read_text())
    ends = [json.loads(line)["evaluations"][-1] for line in open(docs / "results" / "trial.jsonl")]
    price, _ = compare.prices(None, [str(docs / "results" / "trial.jsonl")])
    cost = sum(compare_runs.weighted(end["calls"], price) for end in ends)
    epochs, minutes = sum(end["epoch"] for end in ends), sum(end["seconds"] for end in ends) / 60
    told = FIGURES["totals"](docs, "*.jsonl", {})
    for name, times in (("`trial`", 1), ("`again`", 1), ("together", 2)):
        numbers = (2, len(ends), epochs, cost, minutes)
        cells = " | ".join(f"{times * number:,.0f}" for number in numbers)
        assert f"| {name} | {cells} |" in told
    with pytest.raises(UserError, match="no trained line in none"):
        FIGURES["totals"](docs, "none*.jsonl", {})


def test_two_arms_can_be_compared_at_half_of_what_both_have_paid(docs):
    told = lambda axis: FIGURES["difference"](docs, "trial.jsonl", {}, "better", "plain", "shapes", axis)
    numbers = [float(told(axis).split()[0]) for axis in ("cost/4", "cost/2", "cost")]
    assert numbers == sorted(numbers) and numbers[0] < numbers[1] < numbers[2]
    assert told("cost/1") == told("cost")


def test_a_changed_number_is_seen_and_so_is_a_figure_that_no_page_shows(docs):
    write(docs)
    page = docs / "page.md"
    page.write_text(page.read_text().replace("| plain | 3 | 4 |", "| plain | 3 | 5 |"))
    assert FIGURES["everything"](docs)[page] != page.read_text()
    (docs / "figures" / "old.svg").write_text("<svg></svg>")
    assert FIGURES["orphans"](docs, FIGURES["everything"](docs)) == [docs / "figures" / "old.svg"]


def test_what_is_not_trained_is_told_by_what_a_picture_costs(docs, tmp_path):
    for name, calls in (("few", 10), ("full", 50), ("many", 80)):
        made(tmp_path / name, epochs=(0,), seed=0, gain=0.0)
        lift = {"few": 0.0, "full": 0.2, "many": 0.3}[name]
        with np.load(tmp_path / name / "eval" / "0.npz") as stored:
            scores = {k[6:]: stored[k] + lift for k in stored if k.startswith("score:")}
        save(tmp_path / name / "eval" / "0.npz", scores, 40)
        counted = dict.fromkeys(("velocity", "backward", "decode", "reward"), 0) | {"velocity": calls}
        (tmp_path / name / "price.json").write_text(json.dumps({"picture": counted}))
    runs = compare_runs.load([str(tmp_path / name) for name in ("many", "few", "full")])
    compare.write_results(docs / "results" / "some.jsonl", runs)
    (docs / "page.md").write_text(
        "<!-- made paid some.jsonl few full shapes --><!-- end -->\n"
        "<!-- made bought some.jsonl shapes all_of_them:f*,many --><!-- end -->\n"
    )
    write(docs)
    text = (docs / "page.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines() if "+0." in line] == ["| full", "| many"]
    assert "| 100% |" in text and "| 150% |" in text
    svg = (docs / "figures" / "some-shapes-bought.svg").read_text()
    assert "all of them" in svg and svg.count('r="3"') == 3
    (docs / "page.md").write_text("<!-- made bought some.jsonl shapes all:none* --><!-- end -->")
    with pytest.raises(UserError, match="no arm like none"):
        FIGURES["everything"](docs)


def test_an_audit_is_told_step_by_step(docs):
    interval = [0.5, 0.4, 0.6]
    step = {"step": 3, "t": 0.667, "t_next": 0.556, "noisy": True, "fidelity": interval, "judged": interval,
            "spread": 0.1, "share": 0.5, "gain": [0.101, 0.08, 0.123], "seconds": 1.0, "nfe": 4,
            "parts": {}}  # fmt: skip
    window = {"steps": [3], "times": "0.6..0.7"}
    found = {"format": 1, "holds_for": {}, "weights": "base", "seed": 0, "prompts": 2, "members": 4,
             "finished": 0.5, "group_std": 0.2, "steps": [step], "recommended": window, "usable": window,
             "nfe": {"velocity": 4}, "seconds": 1.0, "compile_seconds": 1.0}  # fmt: skip
    (docs / "results" / "some.json").write_text(json.dumps(found))
    (docs / "page.md").write_text("<!-- made audit some.json --><!-- end -->")
    write(docs)
    row = next(line for line in (docs / "page.md").read_text().splitlines() if line.startswith("| 3 |"))
    assert "0.667" in row and "+.50" in row.replace("+0.", "+.") and ".101" in row


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("valeu trial.jsonl plain shapes", 'try "value"'),
        ("value none.jsonl plain shapes", "no file"),
        ("value trial.jsonl plan shapes", "got 0 results"),
        ("value trial.jsonl plain shape", 'try "shapes"'),
        ("value trial.jsonl plain", "words"),
        ("difference trial.jsonl better plain shapes coast", 'try "cost"'),
        ("table trial.jsonl plan cost", "--against"),
        ("audit none.json", "no file"),
    ],
)
def test_a_place_that_asks_for_what_is_not_there_is_an_error(asked, says, docs):
    (docs / "page.md").write_text(f"<!-- made {asked} --><!-- end -->")
    with pytest.raises(UserError, match=says):
        FIGURES["everything"](docs)


def test_the_table_of_claims_names_every_experiment_with_its_lines_and_seeds():
    told = {}
    for line in (DOCS / "reproducing.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\|[^|]*\| (`\w+`(?:, `\w+`)*) \| (\d+) × (\d+) \|", line):
            told |= {name: (int(found[2]), int(found[3])) for name in re.findall(r"`(\w+)`", found[1])}
    files = (DOCS.parent / "configs" / "paper").glob("*.py")
    experiments = {path.stem: runpy.run_path(str(path))["EXPERIMENT"] for path in files}
    assert told == {name: (len(e.names("shapes")), e.seeds) for name, e in experiments.items()}
