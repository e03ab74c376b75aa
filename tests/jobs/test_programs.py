"""Programs that runs share: equal ones do, and what they compute does not depend on who made them."""

import pytest
import tiny_run

from smart_grpo_jax import main as entry
from smart_grpo_jax.jobs import assemble, programs
from smart_grpo_jax.runtime.metrics import read

SHORT = ("train.epochs=1", "eval.every=0", "eval.prompts=6")
NUMBERS = (
    *("seed=5", "train.learning_rate=0.002", "train.half_life=3.0", "train.weight_decay=0.01"),
    *("train.ema.decay=0.5", "train.warmup=1", "train.clip=0.01", "sampler.noise_level=0.6"),
)


def trained(folder, *overrides):
    assert tiny_run.run(folder, *SHORT, *overrides) == 0
    last = read(folder)[-1]
    return {name: value for name, value in last.items() if not name.startswith("wall/")}


def test_a_run_computes_the_same_with_its_own_programs_and_with_those_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_made", {})
    alone = trained(tmp_path / "alone", *NUMBERS)
    monkeypatch.setattr(programs, "_made", {})
    first = trained(tmp_path / "first")
    second = trained(tmp_path / "second", *NUMBERS)
    assert len(programs._made) == 1
    assert second == alone and first["update/grad_norm"] != alone["update/grad_norm"]


def key(folder, *overrides):
    flags = entry.parse(tiny_run.command(folder / "run", *overrides), entry.MODES)
    return programs.same(assemble.assemble(entry.load_config(flags)))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """The key of the plain run and of one that differs in numbers alone."""
    folder = tmp_path_factory.mktemp("keys")
    plain = key(folder)
    assert plain == key(folder, *NUMBERS)
    return plain


@pytest.mark.parametrize(
    "change", ["train.loss=nft", "search.rounds=2", "sampler.guidance=3.0", "rewards.shapes=2.0"]
)
def test_what_a_program_is_made_of_asks_for_another(change, numbers, tmp_path):
    assert numbers != key(tmp_path, change)


def test_the_oldest_programs_go_first(monkeypatch):
    monkeypatch.setattr(programs, "_made", {})
    monkeypatch.setattr(programs, "same", lambda run: run)
    monkeypatch.setattr(programs, "made", lambda run: f"programs of {run}")
    for run in range(programs.KEPT + 1):
        assert programs.programs_of(run) == f"programs of {run}"
    assert len(programs._made) == programs.KEPT and 0 not in programs._made and 1 in programs._made


def test_a_price_is_asked_for_once():
    asked = []
    price = programs.once(lambda run: asked.append(run) or {"velocity": 1.0})
    assert price("a") == price("b") == {"velocity": 1.0} and asked == ["a"]
