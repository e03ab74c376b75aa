"""Rates and shares: every second and every operation is told of once, and from the right source."""

import dataclasses
import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.jobs import assemble, plan_programs, speed, speed_text, traced
from smart_grpo_jax.runtime.topologies import CHIPS
from tests.jobs import tiny_run

PRICE = {"velocity": 10.0, "decode": 5.0, "reward": 1.0, "gradient": 30.0}
WORK = {"path": 600.0, "search": 1200.0, "decode": 100.0, "reward": 100.0, "update": 2000.0}
SPENT = {"velocity": 300, "backward": 100, "decode": 50, "reward": 50, "images": 40}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told, and a compiler that took so many seconds."""
    now = SimpleNamespace(seconds=100.0, compiled=7.0)
    monkeypatch.setattr(speed.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(speed, "compile_seconds", lambda: now.compiled)
    return now


def timed(monkeypatch, kind="cpu", devices=2):
    """A `Speed` whose prices are known."""
    monkeypatch.setattr(speed, "work", lambda run, price, masks: WORK)
    device = SimpleNamespace(device_kind=kind)
    run = SimpleNamespace(mesh=SimpleNamespace(size=devices, devices=np.array([device])))
    return speed.Speed(run, {}, lambda run, shapes: PRICE)


def an_epoch(clock, meter):
    """10 s of rollout, 2 of them compiling and 3 waiting; 5 s of update, 4 of evaluation, 1 of nothing."""
    with meter.phase("rollout"):
        clock.seconds += 10.0
        clock.compiled += 2.0
        meter.add("host rewards", 3.0)
    with meter.phase("update"):
        clock.seconds += 5.0
    meter.worked(None, SPENT)
    with meter.phase("evaluate"):
        clock.seconds += 4.0
    clock.seconds += 1.0
    return meter.told()


def test_every_second_belongs_to_one_phase(clock, monkeypatch):
    told = an_epoch(clock, timed(monkeypatch))
    shares = {name: told[speed_text.name_of(name)] for name in speed_text.PHASES}
    expected = dict(zip(speed_text.PHASES, np.array([5, 3, 5, 4, 0, 2, 1]) / 20, strict=True))
    assert shares == pytest.approx(expected)


def test_rates_leave_out_evaluations_and_nothing_else(clock, monkeypatch):
    told = an_epoch(clock, timed(monkeypatch))
    assert told["wall/flops_per_second"] == pytest.approx(sum(WORK.values()) / 16)
    assert told["wall/flops_per_second/rollout"] == pytest.approx(2000 / 5)
    assert told["wall/flops_per_second/update"] == pytest.approx(2000 / 5)
    assert told["wall/images_per_second_per_device"] == pytest.approx(40 / 16 / 2)
    assert told["wall/nfe_per_second"] == pytest.approx(400 / 16)


def test_shares_of_work_are_not_made_from_time(clock, monkeypatch):
    told = an_epoch(clock, timed(monkeypatch))
    work = {name: value for name, value in told.items() if name.startswith("work/")}
    assert work == {f"work/{part}": operations / 4000 for part, operations in WORK.items()}


def test_a_line_tells_of_what_came_since_the_last_one(clock, monkeypatch):
    meter = timed(monkeypatch)
    first = an_epoch(clock, meter)
    assert an_epoch(clock, meter) == pytest.approx(first)
    with meter.phase("evaluate"):
        clock.seconds += 9.0
    assert meter.told() == {}, "nothing was worked"


def test_utilisation_is_told_where_the_peak_is_published_and_nowhere_else(clock, monkeypatch):
    told = an_epoch(clock, timed(monkeypatch, "TPU v5 lite", devices=4))
    assert told["wall/mfu"] == pytest.approx(sum(WORK.values()) / 16 / (4 * CHIPS["v5e"].flops))
    assert told["wall/mfu/update"] == pytest.approx(2000 / 5 / (4 * CHIPS["v5e"].flops))
    assert not any("mfu" in name for name in an_epoch(clock, timed(monkeypatch, "cpu")))
    assert speed_text.line({**told, "wall/mfu": 0.312}).startswith("  MFU 31.2% | ")


def test_the_line_fits_a_screen():
    longest = {
        "wall/mfu": 0.4567, "wall/flops_per_second": 1e15, "wall/images_per_second_per_device": 123.4,
        "wall/nfe_per_second": 12345.6, **{f"work/{part}": w / 4000 for part, w in WORK.items()},
        **{speed_text.name_of(phase): 0.1 for phase in ("rollout", "update", "evaluate", "save", "other")},
    }  # fmt: skip
    line = speed_text.line(longest)
    assert len(line) <= 115, line
    assert "rollout 10% (search 60 decode 5 reward 5) update 10% eval 10% save 10%" in line
    assert speed_text.line({"train/reward": 1.0}) == ""


def test_numbers_have_three_digits():
    said = [speed_text.quantity(v) for v in (0.01234, 1.2345, 45.67, 1234.5, 12345.6, 0.0, float("nan"))]
    assert said == ["0.0123", "1.23", "45.7", "1,234", "12.3k", "0", "0"]


def test_an_epoch_costs_less_than_a_millisecond(monkeypatch):
    meter = timed(monkeypatch)

    def once():
        started = time.perf_counter()
        for phase in ("rollout", "update", "evaluate", "save"):
            with meter.phase(phase):
                pass
        meter.worked(None, SPENT)
        speed_text.line(meter.told())
        return time.perf_counter() - started

    assert min(once() for _ in range(50)) < 1e-3  # the others may have been interrupted


def tiny(tmp_path, **changes):
    path = tmp_path / "tiny.py"
    path.write_text(tiny_run.CONFIG.replace("{model}", str(tiny_run.one_layer())))
    values = entry.run_file(str(path))
    for name, text in changes.items():
        configs.override(values, name.replace("__", "."), text)
    return configs.from_dict(values)


CASES = {
    "all weights": {},
    "guided adapters, another guidance inside": {
        "model__path": "shapes", "adapter__kind": "lora", "sampler__guidance": "3.0",
        "search__guidance": "1.0",
    },
    "likelihood-free, with a reference": {"train__loss": "nft", "train__kl_weight": "0.1"},
    "a reference": {"train__kl_weight": "0.1"},
    "local credit": {"search__credit": "local"},
    "difference credit": {"search__credit": "difference"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_parts_add_up_to_the_operations_of_the_programs(name, tmp_path):
    """Prices times images, against the counted programs as training compiles them; these recompute nothing
    and have no padding. The programs multiply a few small matrices beside the networks."""
    config = tiny(tmp_path, **CASES[name])
    paper = plan_programs.paper(config, assemble.make_mesh(0, 1, 1))
    parts = speed.work(*on_paper(paper))
    rollout = plan_programs.rollout_program(paper)
    counted = rollout.operations() * rollout.times
    assert sum(parts[part] for part in speed_text.ROLLOUT) == pytest.approx(counted, rel=2e-3)
    update = plan_programs.update_program(paper)
    assert parts["update"] == pytest.approx(update.operations(), rel=2e-3)


def on_paper(paper):
    """A run without weights; its prices and masks."""
    config = paper.config
    run = SimpleNamespace(
        config=config,
        mesh=paper.mesh,
        pipeline=paper.pipe,
        fns=paper.fns,
        policy=paper.policy,
        recipe=assemble.recipe(config),
        shape=paper.shape,
        frozen=paper.frozen,
        prompts=SimpleNamespace(prompts=["a photo of a red circle"]),
        reward=paper.judged.training,
        search_reward=paper.judged.search,
        rollout_params=lambda learned: {"policy": paper.policy.bind(paper.frozen, learned), **paper.fixed},
    )
    masks = traced.credit_masks(config, paper.times, 0, np.ones(config.prompts.groups, bool))
    return run, speed.prices(run, paper.state.params), masks


def test_work_is_what_the_model_asks_for_whatever_is_recomputed(tmp_path):
    config = tiny(tmp_path)
    memory = dataclasses.replace(config.memory, remat="full")
    papers = [
        plan_programs.paper(one, assemble.make_mesh(0, 1, 1))
        for one in (config, dataclasses.replace(config, memory=memory))
    ]
    plain, recomputed = (speed.work(*on_paper(paper)) for paper in papers)
    assert plain == recomputed
    updates = (plan_programs.update_program(paper) for paper in papers)
    assert len({update.operations() for update in updates}) == 2


@pytest.mark.slow
def test_a_run_writes_its_speed_and_keeps_a_trace(tmp_path, capsys):
    folder = tmp_path / "run"
    quick = ("train.epochs=3", "eval.every=0", "eval.prompts=4", "train.check_rewards=false")
    assert tiny_run.run(folder, *quick, flags=["--profile"]) == 0
    out = capsys.readouterr().out
    first, *others = tiny_run.read(folder)
    assert not any(name.startswith(("wall/share", "work/")) for name in first)
    for row in others:
        shares = [value for name, value in row.items() if name.startswith("wall/share/")]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
        assert sum(value for name, value in row.items() if name.startswith("work/")) == pytest.approx(1.0)
        assert row["wall/nfe_per_second"] > 0 and "wall/mfu" not in row
    assert out.count(" img/s/dev | ") == 3 and "profile of epoch 3: " in out
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert "where operations go" in (folder / "report.html").read_text()
    works = [{k: v for k, v in row.items() if k.startswith("work/")} for row in others]
    assert all(a == b for a, b in itertools.pairwise(works))
