"""The plan: the same programs with the same arguments as training, on paper."""

import dataclasses
import itertools
import json
import math
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import (
    assemble,
    evaluate,
    footprint,
    judges,
    microbatch,
    plan,
    plan_numbers,
    plan_picture,
    plan_programs,
    plan_slices,
    plan_sweep,
    plan_text,
    traced,
)
from smart_grpo_jax.jobs.footprint import Held, Line
from smart_grpo_jax.jobs.plan_cache import Cache
from smart_grpo_jax.jobs.plan_numbers import Phase, Plan
from smart_grpo_jax.main import run_file
from smart_grpo_jax.policy import credit, rollout
from smart_grpo_jax.rewards import base, skeletons
from smart_grpo_jax.runtime import aot
from smart_grpo_jax.runtime.mesh import make_mesh
from smart_grpo_jax.runtime.topologies import CHIPS, GIB, parse
from tests.jobs import tiny_run
from tests.jobs.test_microbatch import PRINT


def tiny(tmp_path, **changes):
    path = tmp_path / "tiny.py"
    path.write_text(tiny_run.CONFIG.replace("{model}", str(tiny_run.one_layer())))
    values = run_file(str(path))
    for name, text in changes.items():
        configs.override(values, name.replace("__", "."), text)
    return configs.from_dict(values)


def shapes(tree):
    return jax.tree.map(lambda a: (tuple(np.shape(a)), np.dtype(getattr(a, "dtype", type(a)))), tree)


CASES = {
    "all weights": {},
    "adapters, guided, in pieces": {
        "model__path": "shapes", "adapter__kind": "lora", "sampler__guidance": "3.0", "memory__rollout": "2",
    },
    "likelihood-free": {"train__loss": "nft"},
    "local credit": {"search__credit": "local", "search__forecast": "base"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_who_forecasts_is_the_policy_or_the_model_before_training(kind, tmp_path):
    def forecasts(**changes):
        """At the start and after training, of one latent."""
        config = tiny(tmp_path, adapter__kind=kind, adapter__targets="/attn/to_q$", **changes)
        run = assemble.assemble(config)
        start = run.state().params
        later = jax.tree.map(lambda a: a + 0.1, start)
        drawn = prompt_data.epoch_groups(len(run.prompts.prompts), config.prompts.groups, config.seed, 0)
        texts = [run.prompts.prompts[drawn[0]]]
        batch, _ = assemble.make_batch(run, texts, 1, run.reward, range(1))
        x, t = jnp.ones((1, *run.shape.latent)), jnp.full(1, 0.5)
        ask = jax.jit(run.fns.search_velocity)
        return [ask(run.rollout_params(w)["policy"], x, t, batch.cond) for w in (start, later)]

    first, second = forecasts()
    assert np.abs(first - second).max() > 1e-3
    before, after = forecasts(search__forecast="base")
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(before, first, atol=1e-5)  # float32, other fusions


@pytest.mark.parametrize("name", CASES)
def test_the_programs_on_paper_have_the_arguments_of_training(name, tmp_path):
    config = tiny(tmp_path, **CASES[name])
    run = assemble.assemble(config)
    paper = plan_programs.paper(config, run.mesh)
    state = run.state()
    assert shapes(paper.state) == shapes(state)
    roll = plan_programs.rollout_program(paper)
    drawn = prompt_data.epoch_groups(len(run.prompts.prompts), config.prompts.groups, config.seed, 0)
    texts = [run.prompts.prompts[i] for i in drawn]
    size, calls = assemble.groups_per_call(run, len(texts), config.prompts.members, config.memory.rollout)
    batch, _ = assemble.make_batch(run, texts[:size], size, run.reward, range(size))
    knobs = traced.rollout_knobs(config, run.times, 0)
    real = (run.rollout_params(state.params), knobs, batch)
    assert shapes(roll.args) == shapes(real)
    assert roll.times == calls
    acted = jax.eval_shape(lambda *args: rollout.act(run.fns, run.shape, *args), *real)
    masks = traced.credit_masks(config, run.times, 0, np.ones(size, bool))
    experience = jax.eval_shape(lambda a: credit.experience(run.rule, run.shape, a, masks), acted)
    learn = plan_programs.update_program(paper)
    planned = jax.tree.leaves(learn.args[3])
    for one, other in zip(planned, jax.tree.leaves(experience), strict=True):
        assert one.shape[1:] == other.shape[1:] and one.shape[0] == other.shape[0] * calls
    assert shapes(learn.args[1]) == shapes(run.frozen)
    look = plan_programs.evaluate_program(paper)
    items = run.eval_items
    size, calls = evaluate.groups_per_call(run, len(items))
    batch, _ = assemble.make_batch(run, [i.text for i in items[:size]], size, run.eval_reward, range(size))
    times = assemble.time_grid(config, run.pipeline, config.sampler.eval_steps)
    knobs = evaluate.eval_knobs(config, times, False, 0)
    params = run.rollout_params(state.ema) | {
        "reward": run.eval_reward.params,
        "search_reward": run.search_reward.params,
    }
    assert shapes(look.args) == shapes((params, knobs, batch)) and look.times == calls


def test_flow_grpo_has_the_searchs_branch_and_room_for_it_and_does_no_work_in_it(tmp_path):
    found = {}
    for name, text in (("off", "none"), ("two", "1,2"), ("all", "0,1,2,3,4")):
        config = tiny(tmp_path, search__steps=text, memory__rollout="auto", search__chunk="auto")
        trial = microbatch.trial(config, 1)
        paper = plan_programs.paper(trial, make_mesh(1, 1, 1, jax.devices()[:1]))
        program = plan_programs.rollout_program(paper)
        work = program.operations()
        found[name] = (footprint.of(paper), work, program.often)
    prints, work, often = ({name: row[i] for name, row in found.items()} for i in range(3))
    assert prints["off"] == prints["two"] == prints["all"] and prints["off"].searched == 4
    assert often == {"off": 0, "two": 2 / 6, "all": 5 / 6}
    assert 0 < 5 * (work["two"] - work["off"]) == pytest.approx(2 * (work["all"] - work["off"]))


TRUE_SIZES = {"image_reward": 446e6 - 0.93e6, "aesthetic": 304e6, "pick_score": 633e6, "hps": 633e6}
"""Parameters in the graph (the facts' totals without text towers and with folded heads), within 1 %."""


@pytest.mark.parametrize("name", skeletons.SKELETONS)
def test_a_skeleton_scores_on_paper_at_its_true_size(name):
    made = skeletons.build(name, {"weight": 1.0, "path": "/nowhere", "dtype": "bfloat16"}, None)
    images = jax.ShapeDtypeStruct((3, 64, 48, 3), np.float32)
    ctx = made.prepare(["a", "b", "c"])
    scores = jax.eval_shape(lambda p, i, c: made.score(p, i, c, None), made.params, images, ctx)
    assert scores.value.shape == (3,) and scores.value.dtype == np.float32
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made.params))
    if name in TRUE_SIZES:
        assert abs(size / TRUE_SIZES[name] - 1) < 0.01


def test_every_reward_with_published_weights_has_a_skeleton():
    """What can be built without a path needs none."""
    without = {"shapes", "shapes_aesthetic", "compressibility", "incompressibility"}
    shipped = {"shapes_image_reward", "shapes_aesthetic_clip"}
    assert set(base.REWARDS) - without - shipped - base.HOST == set(skeletons.SKELETONS)


def test_rewards_on_paper_are_no_copies_of_each_other(tmp_path):
    config = tiny(tmp_path)
    config = dataclasses.replace(
        config, rewards={"image_reward": 1.0}, search_reward={"image_reward": 1.0}, eval_rewards={}
    )
    judged = judges.assemble(config, make_mesh(0, 1, 1), skeletons.build, plan_programs.on_paper)
    first, second = (jax.tree.leaves(j.params) for j in (judged.training, judged.search))
    assert all(a is b for a, b in zip(first, second, strict=True))


def phase(name, **found):
    return Phase(name, aot.FITS, found, "")


def answer(topology, *phases, **rest):
    made = Plan(topology, phases, {"data": 4, "fsdp": 4, "tensor": 1}, "as given", NUMBERS, **rest)
    return made, plan_numbers.summary(made)


NUMBERS = {"rollout": 2, "decode": 16, "reward": 16, "chunk": 16, "train": 144}


def test_the_summary_adds_up():
    """Two programs on 16 chips: 1 PFLOP at 197 TFLOP/s each, and what they send at 200 GB/s; an evaluation
    of the same work every tenth epoch."""
    here = parse("v5e:4x4")
    both = [
        phase("rollout", times=2, flops=5e14, images=100, peak_bytes=2 * GIB, resident_bytes=GIB),
        phase("update", times=1, flops=1e15, images=100, peak_bytes=GIB, sent_bytes={"fsdp": 4e11}),
        phase("evaluate", times=4, flops=2.5e14, images=60, share=0.1),
    ]
    made, found = answer(here, *both)
    compute = 1e15 / 16 / CHIPS["v5e"].flops
    low, high = compute + max(compute, 2.0) + 0.1 * compute, 2.1 * compute / plan_numbers.LOW + 2.0
    assert found["fits"]
    np.testing.assert_allclose(found["flops_per_image"], 2.1e13)
    assert found["phases"]["rollout"]["total_bytes"] == 3 * GIB
    np.testing.assert_allclose(found["epoch_seconds"], [low, high])
    np.testing.assert_allclose(found["images_per_second"], [100 / high, 100 / low])
    np.testing.assert_allclose(found["device_hours_per_epoch"][0], low * 16 / 3600)
    json.dumps(found)
    told = plan_text.text(made, found)
    assert "fits: yes; rollout takes 3.00 of 15.75 GiB" in told
    assert "v5e:4x4: 16 chips on 2 hosts, mesh data 4 × fsdp 4 × tensor 1 (as given)" in told
    assert "fsdp 372.53" in told and "2 groups per rollout" in told


def test_memory_bounds_the_upper_end_and_slices_are_far_apart():
    """8.19e12 bytes at 819 GB/s are ten seconds; between slices a chip has an eighth of 3.1 GB/s."""
    near, far = parse("v5e:4x4"), parse("2xv5e:4x4")
    one = phase("update", times=1, flops=0.0, memory_bytes=8.19e12, sent_bytes={"data": 3.1e9, "fsdp": 2e11})
    chip = CHIPS["v5e"]
    assert plan_numbers.seconds(near, one) == pytest.approx((203.1e9 / chip.ici, 10.0 + 203.1e9 / chip.ici))
    assert plan_numbers.seconds(far, one)[1] == pytest.approx(10.0 + 2e11 / chip.ici + 8.0)


def test_what_earlier_calls_left_lies_beside_a_rollout():
    one = phase("rollout", times=3, peak_bytes=5.0, output_bytes=2.0, resident_bytes=1.0)
    assert one.beside == 1.0 + 2 * 2.0 and one.total == 10.0


def test_the_picture_stacks_up_to_the_total():
    here = parse("v5e:4x4")
    one = phase("rollout", peak_bytes=5 * GIB, argument_bytes=2 * GIB, resident_bytes=GIB)
    made, _ = answer(here, one, Phase("update", aot.CRASHED, {}, "Check failed"))
    assert [part / GIB for part in plan_picture.stacked(one)] == [1, 2, 3]
    drawn = plan_picture.svg(made)
    ElementTree.fromstring(drawn)
    assert "usable 15.75" in drawn and "does not fit" in drawn and "compiler crashed" in drawn


class Asked:
    """A compiler that refuses what takes more rows than it likes."""

    def __init__(self, fits, footprint=PRINT):
        self.fits, self.footprint, self.seen = fits, footprint, []

    def __call__(self, config, topology, program):
        self.seen.append((program, microbatch.numbers_of(config)))
        if program == "footprint":
            return aot.Outcome(aot.FITS, {"footprint": self.footprint.as_dict()})
        if self.fits(program, config):
            return aot.Outcome(aot.FITS, {"times": 1, "peak_bytes": 3.0 * GIB, "flops": 1.0, "images": 9})
        return aot.Outcome(aot.TOO_LARGE, {"times": 1}, "RESOURCE_EXHAUSTED")


def automatic(tmp_path):
    names = ("memory__rollout", "memory__decode", "memory__reward", "memory__train", "search__chunk")
    return tiny(tmp_path, mesh__fsdp="auto", **dict.fromkeys(names, "auto"))


def test_a_solved_microbatch_that_does_not_fit_is_halved_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "compiled_for", lambda topology: True)
    config = automatic(tmp_path)
    light = dataclasses.replace(PRINT, gradient=Line(0.0, 0.05 * GIB))
    ask = Asked(lambda program, c: program != "update" or c.memory.train <= 300, light)
    made = plan.planned(config, parse("v5e:2x2"), ask)
    trained = [numbers["train"] for program, numbers in ask.seen if program == "update"]
    assert made.fits and len(trained) == made.tries > 1 and trained[-1] == made.numbers["train"]
    assert all(one > other for one, other in itertools.pairwise(trained))
    assert set(made.solved) == {"rollout", "decode", "reward", "chunk", "train"}
    evaluated = [numbers for program, numbers in ask.seen if program == "evaluate"]
    assert len(evaluated) == 1, "smaller updates are no reason to compile an evaluation again"
    lines = {one.name: one.found["estimated_bytes"] for one in made.phases if one.name != "evaluate"}
    assert lines == plan_slices.estimate(
        microbatch.with_numbers(config, made.numbers), light, parse("v5e:2x2")
    )
    assert "solved: " in plan_text.text(made, plan_numbers.summary(made))


def test_halving_is_bounded_and_what_was_given_is_never_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "compiled_for", lambda topology: True)
    ask = Asked(lambda program, c: False)
    made = plan.planned(automatic(tmp_path), parse("v5e:2x2"), ask)
    assert not made.fits and sum(program == "update" for program, _ in ask.seen) <= plan.TRIES
    ask = Asked(lambda program, c: False)
    made = plan.planned(tiny(tmp_path, memory__train="8"), parse("v5e:2x2"), ask)
    assert {program for program, _ in ask.seen[:3]} == set(plan.PHASES)  # two at a time, in any order
    assert [program for program, _ in ask.seen[3:]] == ["footprint"]
    assert made.other is not None and made.numbers["train"] == 8
    assert "fits: no; rollout: does not fit" in plan_text.text(made, plan_numbers.summary(made))


def test_what_cannot_be_compiled_here_is_an_estimate_and_says_so(tmp_path):
    config, ask = automatic(tmp_path), Asked(lambda program, c: c.model.attention == "chunked")
    made = plan.planned(config, parse("gpu:h200:8"), ask)
    assert made.fits and {p.verdict for p in made.phases} == {plan_numbers.COUNTED}
    assert "an estimate: nothing was compiled" in plan_text.text(made, plan_numbers.summary(made))
    huge = dataclasses.replace(PRINT, fixed=Held(900.0 * GIB, 0.0))
    made = plan.planned(config, parse("gpu:h200:8"), Asked(lambda program, c: True, huge))
    assert not made.fits and "usable" in made.phases[0].reason


def test_answers_are_kept_and_asked_for_once(tmp_path):
    kept = Cache(tmp_path / "parts", exact=False)
    request = {"config": {"a": 1}, "topology": "v5e:2x2", "program": "update", "compile": True}
    done = aot.Outcome(aot.TOO_LARGE, {"peak_bytes": 3.0}, "why")
    assert kept.get(request) is None
    kept.put(request, done)
    assert kept.get(request) == done
    assert kept.get(request | {"config": {"a": 2}}) is None
    assert Cache(tmp_path / "parts", exact=True).get(request) is None
    assert kept.programs == str(tmp_path / "parts" / "programs") and Cache(None, False).programs == ""
    kept.put(request | {"program": "rollout"}, aot.Outcome(aot.LATE, {}, "no answer"))
    assert kept.get(request | {"program": "rollout"}) is None


def test_one_answer_serves_smart_grpo_and_flow_grpo(tmp_path, monkeypatch):
    asked = []

    def child(module, request, env, limit):
        asked.append(request)
        return aot.Outcome(aot.FITS, {"flops": 9.0, "peak_bytes": 3.0, "never": {"flops": 4.0}})

    monkeypatch.setattr(aot, "child", child)
    ask = plan.asker(False, str(tmp_path / "plan.json"))
    smart, flow = (
        configs.from_dict(run_file(f"configs/sd35_medium.py:{name}")) for name in ("smart_grpo", "flow_grpo")
    )
    assert plan.with_search(flow) == smart and plan.with_search(smart) is smart
    here = parse("cpu:2")
    assert ask(smart, here, "rollout").found == {"flops": 9.0, "peak_bytes": 3.0}
    assert ask(flow, here, "rollout").found == {"flops": 4.0, "peak_bytes": 3.0}
    assert len(asked) == 1 and asked[0]["kept"] == str(tmp_path / "plan.parts" / "programs")


def test_a_search_that_could_not_be_is_not_put_into_a_plan(tmp_path):
    for changes in ({"search__credit": "difference"}, {"sampler__window__kind": "fixed"}):
        plain = tiny(tmp_path, search__rounds="0", **changes)
        assert plan.with_search(plain) is plain


def test_a_sweep_takes_slices_with_their_meshes_and_has_a_row_for_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "compiled_for", lambda topology: True)
    monkeypatch.setattr(plan, "asker", lambda exact, out: Asked(lambda program, c: c.mesh.fsdp > 1))
    out = tmp_path / "sweep.json"
    assert plan_sweep.job(tiny(tmp_path), "v5e:2x2, v5e:2x4@fsdp=4+tensor=2", out=str(out))
    found = json.loads(out.read_text())["plans"]
    assert [(one["topology"], one["fits"]) for one in found] == [("v5e:2x2", False), ("v5e:2x4", True)]
    assert found[1]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    rows = capsys.readouterr().out
    assert "1 × 4 × 2" in rows and "does not fit" in rows
    for text, hint in (
        ("v5e:2x2@fsd=2", "fsdp"),
        ("v5e:2x2@fsdp=x", "number"),
        ("v5e:3x3", "sold"),
        (" ", "empty"),
    ):
        with pytest.raises(UserError, match=hint):
            plan_sweep.job(tiny(tmp_path), text)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ([], "--topology: is missing"),
        (["--topology=v5e:3x3"], "v5e is sold as"),
        (["--topology=v5e:2x2", "--check"], "--check: got --mode=plan"),
        (["--sweep=v5e:2x2@fsdp=many"], "--sweep: got"),
    ],
)
def test_a_mistake_is_one_line(flags, hint, capsys):
    assert entry.main(["--config=configs/shapes.py", "--mode=plan", *flags]) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_plan_for_this_kind_of_machine_names_the_peak_that_the_compiler_gives(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = tiny_run.command(tmp_path / "r", mode="plan", flags=["--topology=cpu:2", f"--json={out}"])
    assert entry.main(command) == 0
    found = json.loads(out.read_text())
    assert found["fits"] and found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert set(found["phases"]) == set(plan.PHASES) and found["saved_bytes"] > 0
    ElementTree.parse(out.with_suffix(".svg"))
    for one in found["phases"].values():
        assert one["peak_bytes"] >= one["temp_bytes"] > 0 and one["flops"] > 0
    assert "rollout" in capsys.readouterr().out
