import base64
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from smart_grpo_jax.core.config import Config, Search, Train, to_dict
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import report, report_curves, report_folder, report_plot, statistics
from smart_grpo_jax.jobs import report_pictures as rp
from smart_grpo_jax.worlds.shapes import grammar

EVIL = "a <script>alert('x')</script> & \"quoted\" circle"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balance(HTMLParser):
    """Collects tags and text, and what does not close."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.seen, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))

    def handle_data(self, data):
        self.texts.append(data)


def parsed(page):
    balance = Balance()
    balance.feed(page)
    balance.close()
    assert not balance.faults and not balance.open
    return balance


def pictures(rng, shape, quality):
    """Blocks of colour under noise that shrinks with quality."""
    blocks = np.repeat(np.repeat(rng.integers(40, 256, (*shape[:-3], 4, 4, 3)), 8, -3), 8, -2)
    noise = rng.normal(0, 60 * (1 - quality), blocks.shape)
    return np.clip(blocks + noise, 0, 255).astype(np.uint8)


def evaluation(folder, epoch, prompts, gain, *, seeds=2, shown=16):
    rng = np.random.default_rng(7)
    skill = rng.uniform(0.1, 0.9, (len(prompts), seeds))
    luck = np.random.default_rng(epoch).normal(0, 0.1, skill.shape)
    graded = np.clip(skill + gain + (luck if epoch else 0), 0, 1).astype(np.float32)
    second = np.clip(graded - 0.05 - 0.2 * gain, 0, 1)
    scores = {
        "reward": graded,
        "shapes": graded,
        "shapes/strict": (graded > 0.6).astype(np.float32),
        "second/graded": second,
        "second/strict": (second > 0.6).astype(np.float32),
        "shapes_aesthetic": 0.3 + 0 * graded,
    }
    (folder / "eval").mkdir(exist_ok=True)
    images = pictures(rng, (shown, 32, 32, 3), 0.5 + gain)
    named = {f"score:{name}": value for name, value in scores.items()}
    np.savez_compressed(folder / "eval" / f"{epoch}.npz", prompts=np.asarray(prompts), images=images, **named)
    means = {f"eval/{name}": float(value.mean()) for name, value in scores.items()}
    return means | {"eval/judge_gap": means["eval/shapes"] - means["eval/second/graded"]}


def walk(folder, prompts, steps=10):
    rng = np.random.default_rng(3)
    plain = np.stack([pictures(rng, (len(prompts), 32, 32, 3), j / steps) for j in range(steps)])
    times = np.linspace(1, 0.1, steps, dtype=np.float32)
    np.savez_compressed(
        folder / "eval" / "steps.npz", times=times, prompts=np.asarray(prompts), plain=plain, searched=plain
    )


def row(rng, epoch, gain):
    out = {
        "epoch": epoch,
        "step": 2 * epoch,
        "train/reward": 0.55 + gain + rng.normal(0, 0.02),
        "train/group_std": 0.2 - 0.1 * gain,
        "train/zero_std_groups": 0.05 + 0.2 * gain,
        "train/failed": 0.0,
        "update/kl": 0.004 * epoch,
        "update/approx_kl": 1e-6 * (1 + rng.normal(0, 0.1)),
        "update/loss": None,
        "update/loss/nonfinite": True,
        "wall/train_seconds": 31.0 * epoch,
    }
    for j in (4, 5, 6):
        out |= {f"search/step_{j}/first": 0.5 + gain, f"search/step_{j}/last": 0.5 + gain + 0.3 / j}
    out |= {f"search/step_{j}/{end}": None for j in (0, 1) for end in ("first", "last")}
    return out | {f"nfe/{n}": 48_000 * epoch for n in ("velocity", "backward", "decode", "reward", "images")}


def make_run(folder, *, epochs=40, wanted=40, every=10, final_gain=0.2, steps=True, prompts=None):
    folder.mkdir(exist_ok=True)
    prompts = prompts or grammar.splits()["heldout"][:60]
    rng = np.random.default_rng(0)
    rows = []
    for epoch in range(epochs + 1):
        gain = final_gain * epoch / max(wanted, 1)
        one = row(rng, epoch, gain) if epoch else {"epoch": 0, "step": 0, "nfe/velocity": 0}
        if epoch % every == 0:
            one |= evaluation(folder, epoch, prompts, gain) | {"wall/eval_seconds": 12.5}
        rows.append(json.dumps(one))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"epoch": 4')
    config = dataclasses.replace(Config(), train=Train(epochs=wanted, clip=2e-3), search=Search(rounds=3))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "command.txt").write_text(
        "2025-10-02T10:00:00+0000  python -m smart_grpo_jax.main --config=c.py\n"
    )
    env = {
        "python": "3.11.2",
        "versions": {"jax": "0.10.2", "flax": None},
        "platform": "tpu",
        "devices": ["0: TPU v4", "1: TPU v4"],
        "host": "secret-host",
        "git": "abc",
    }
    (folder / "env.json").write_text(json.dumps(env))
    if steps:
        walk(folder, prompts[:2])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "shapes")


def text_of(folder):
    return report.write(folder).read_text(encoding="utf-8")


def test_a_complete_run_shows_every_section(run):
    path = report.write(run)
    assert path == run / "report.html"
    page = parsed(path.read_text(encoding="utf-8"))
    titles = [
        "Before and after", "Scores", "Reward", "Two judges", "Hacking meter", "Distance from the base",
        "Groups", "Gain of the search by step", "Prompts that changed most",
        "Accuracy by task", "Along the rollout",
        "Reward against cost", "Settings", "Machine and command",
    ]  # fmt: skip
    assert [t for t in titles if t not in page.texts] == []
    assert sum(tag == "svg" for tag, _ in page.seen) == 2 + 7 + 1
    assert "Not drawn" not in path.read_text()


def test_the_page_stands_alone(run):
    page = text_of(run)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", page)
    images = [attrs for tag, attrs in parsed(page).seen if tag == "img"]
    assert len(images) >= 32 and all(a["src"].startswith("data:image/") and a["alt"] for a in images)


def test_equal_folders_give_equal_bytes(run):
    assert report.write(run).read_bytes() == report.write(run).read_bytes()


def test_the_sentence_gives_means_and_paired_interval(run):
    rows = report_folder.read(run).comparison()
    assert rows[0]["name"] == "shapes", "the reward is the graded score alone, and is not told twice"
    sentence = report.result(report_folder.read(run))
    assert re.fullmatch(
        r"Graded reward 0\.\d{3} → 0\.\d{3} on 60 held-out prompts, paired difference \+0\.\d{3} ± 0\.\d{3}",
        sentence,
    )
    assert f"{rows[0]['difference']:+.3f} ± {rows[0]['half_width']:.3f}" in sentence


@pytest.mark.parametrize(
    ("gain", "opening"), [(0.0, "No difference shown: "), (-0.2, "Worse: "), (0.2, "Graded")]
)
def test_the_sentence_claims_only_what_the_interval_shows(tmp_path, gain, opening):
    make_run(tmp_path / "r", epochs=1, wanted=1, every=1, final_gain=gain, steps=False)
    story = report_folder.read(tmp_path / "r")
    assert report.result(story).startswith(opening)
    assert ("sees the gain" in report.second_opinion(story)) == (gain > 0)


def test_prompts_are_text_and_never_markup(tmp_path):
    page = text_of(
        make_run(tmp_path / "r", epochs=10, prompts=[EVIL, *[f"plain words {i}" for i in range(30)]])
    )
    assert "<script" not in page
    assert EVIL in parsed(page).texts
    assert "Accuracy by task" not in page, "these prompts are not of the shapes world"


def test_a_run_without_steps_has_no_strip(tmp_path):
    page = text_of(make_run(tmp_path / "r", epochs=10, steps=False))
    assert "Along the rollout" not in page and "Before and after" in page


def test_a_run_that_goes_on_says_so(tmp_path):
    page = text_of(make_run(tmp_path / "r", epochs=15, wanted=40))
    assert "epoch 15 of 40: still going, or stopped early" in page
    assert "after is epoch 10" in page


def test_only_the_base_is_shown_without_a_claim(tmp_path):
    folder = make_run(tmp_path / "r", epochs=0, steps=False)
    page = text_of(folder)
    parsed(page)
    assert "Only the base is evaluated so far" in page and "no later evaluation is stored yet" in page
    assert "paired difference" not in re.sub(r"<figcaption>.*?</figcaption>", "", page)
    with pytest.raises(UserError, match="wanted epoch 0 and a later one"):
        report.before_after(folder)


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: (p.mkdir(), (p / "a").mkdir())]
)
def test_a_folder_without_a_run_is_a_user_error(tmp_path, make):
    make(tmp_path / "r")
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path / "r")


def test_each_file_may_be_missing_or_damaged(tmp_path):
    files = ("config.json", "command.txt", "env.json", "metrics.jsonl", "eval/0.npz", "eval/10.npz")
    for i, name in enumerate(files):
        folder = make_run(tmp_path / f"missing{i}", epochs=10)
        (folder / name).unlink()
        parsed(text_of(folder))
    for name in ("config.json", "env.json", "eval/10.npz", "eval/steps.npz"):
        folder = make_run(tmp_path / f"damaged-{name.replace('/', '-')}", epochs=10)
        (folder / name).write_bytes(b"PK\x03\x04 half of it")
        page = text_of(folder)
        parsed(page)
        assert f"{name} is damaged and was left out." in page


def test_sample_sheets_stand_in_for_missing_evaluations(tmp_path):
    folder = tmp_path / "r"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(Config())))
    for epoch in (0, 5, 10):
        Image.new("RGB", (8, 8)).save(folder / "samples" / f"{epoch}.png")
    alts = [attrs["alt"] for tag, attrs in parsed(text_of(folder)).seen if tag == "img"]
    assert alts == ["Sample sheet of epoch 0", "Sample sheet of epoch 10"]


def test_settings_that_differ_from_the_defaults_are_marked(run):
    changed = re.findall(r'<tr class="changed"><th scope="row"><code>([^<]*)</code>', text_of(run))
    assert sorted(set(changed)) == ["search.rounds", "train.clip", "train.epochs"]


def test_the_host_name_stays_in_the_folder(run):
    assert "secret-host" not in text_of(run)


def test_the_search_gain_is_last_minus_first_and_skips_steps_that_were_not_searched(run):
    story = report_folder.read(run)
    assert report_curves.search_steps(story) == [4, 5, 6]
    x, y = report_curves.search_gain(story, 4)
    assert len(x) == 40 and np.allclose(y, 0.3 / 4)


def test_the_gap_of_the_judges_starts_at_zero(run):
    curve = next(make for title, _, make, _ in report_curves.CURVES if title == "Hacking meter")
    (line,) = curve(report_folder.read(run))
    assert line.y[0] == 0 and line.y[-1] > 0


def test_large_pictures_are_shrunk(tmp_path):
    big = np.random.default_rng(0).integers(0, 256, (1024, 768, 3), np.uint8)
    uri = rp.uri(big)
    assert uri.startswith("data:image/jpeg") and len(uri) < 200_000
    assert rp.uri(big[:32, :32]).startswith("data:image/png")


def test_the_curve_for_the_readme_is_a_picture_of_its_own(run):
    svg = report.svg_curve(run)
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme: dark" in svg
    assert svg.count("<polyline") == 2 and svg.count("<polygon") == 1


def test_the_curve_needs_rows(tmp_path):
    folder = make_run(tmp_path / "r", epochs=0)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        report.svg_curve(folder)


def test_before_after_has_two_rows_of_eight(run):
    image = report.before_after(run)
    assert image.size == (rp.MARGIN + 8 * (rp.TILE + rp.GAP), rp.CAPTION + 2 * (rp.TILE + rp.GAP))
    tuned = report_folder.read(run).evaluations[-1].images[1]
    x, y = rp.MARGIN + rp.TILE + rp.GAP, rp.CAPTION + rp.TILE + rp.GAP
    tile = np.asarray(image)[y : y + rp.TILE, x : x + rp.TILE]
    assert np.array_equal(tile[2:90:4, 2:90:4], tuned[:22, :22]), "each pixel is a block of 4 × 4"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.5213, 0.5217), (-3e-7, 2e-6), (0, 4_800_000), (7, 7), (0, 0), (-2, -1)]
)
def test_ticks_are_few_and_enclose_the_data(low, high):
    found = report_plot.ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    assert 2 <= len(found) <= 9 and np.all(np.diff(found) > 0)


def test_numbers_are_short():
    said = [report_plot.number(v) for v in (0, 3, 0.25, 1_200_000, 350_000, 3.1e-7, -0.5)]
    assert said == ["0", "3", "0.250", "1.2M", "350k", "3.1e-7", "-0.500"]
    assert [report_plot.number(v, 500_000) for v in (0, 500_000, 2e6)] == ["0", "0.5M", "2M"]


def test_one_point_is_drawn_and_no_point_is_refused():
    one = report_plot.lines([report_plot.Line("a & b", [3], [0.5])], title="t", x_label="epoch")
    assert "NaN" not in one and "nan" not in one and "a &amp; b" in one and 'class="fill0"' in one
    with pytest.raises(ValueError, match="nothing to draw"):
        report_plot.lines([report_plot.Line("a", [], [])], title="t")


def test_interval_is_of_prompts_and_passes_over_failed_scores():
    difference = np.array([[0.1, 0.3], [0.0, np.nan], [np.nan, np.nan], [0.4, 0.4]])
    mean, half = statistics.interval(difference)
    per_prompt = np.array([0.2, 0.0, 0.4])
    assert mean == pytest.approx(per_prompt.mean(), abs=1e-12)  # the same sums in another order
    assert half == pytest.approx(1.96 * per_prompt.std(ddof=1) / np.sqrt(3), abs=1e-12)
    assert statistics.interval(np.ones((1, 3)))[1] == np.inf


def test_comparison_takes_pairs_and_names_each_score_once():
    base = {"reward": np.array([[0.2], [0.4], [np.nan]]), "pick_score": np.array([[1.0], [2.0], [3.0]])}
    tuned = {"reward": np.array([[0.3], [np.nan], [0.9]]), "pick_score": np.array([[2.0], [2.0], [5.0]])}
    rows = {r["name"]: r for r in statistics.comparison(base, tuned)}
    assert list(rows) == ["reward", "pick_score"]
    assert (rows["reward"]["base"], rows["reward"]["tuned"]) == (0.2, 0.3)
    assert rows["pick_score"]["difference"] == 1.0
    same = {"reward": base["pick_score"], "pick_score": base["pick_score"]}
    assert [r["name"] for r in statistics.comparison(same, same)] == ["pick_score"]


def test_the_page_reads_back_as_png(run):
    first = next(a["src"] for t, a in parsed(text_of(run)).seen if t == "img")
    stored = Image.open(io.BytesIO(base64.b64decode(first.split(",", 1)[1])))
    assert np.array_equal(np.asarray(stored), report_folder.read(run).base.images[0])
