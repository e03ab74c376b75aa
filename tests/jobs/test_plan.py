"""The plan: the same programs with the same arguments as training, on paper."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import assemble, judges, plan, plan_programs, traced
from smart_grpo_jax.main import run_file
from smart_grpo_jax.policy import credit, rollout
from smart_grpo_jax.rewards import base, skeletons
from smart_grpo_jax.runtime.mesh import make_mesh
from smart_grpo_jax.runtime.topologies import CHIPS, GIB, parse
from tests.jobs import tiny_run


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
    "local credit": {"search__credit": "local"},
}  # fmt: skip


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
    return plan.Phase(name, plan.FITS, found, "")


def test_the_summary_adds_up():
    """Two programs on 16 chips: 1 PFLOP at 197 TFLOP/s each, and what they send at 200 GB/s."""
    here = parse("v5e:4x4")
    both = [
        phase("rollout", times=2, flops=5e14, images=100, peak_bytes=2 * GIB, resident_bytes=GIB, mesh={}),
        phase("update", times=1, flops=1e15, images=100, peak_bytes=GIB, sent_bytes={"fsdp": 4e11}),
    ]
    found = plan.summary(here, both)
    compute = 1e15 / 16 / CHIPS["v5e"].flops
    assert found["fits"] and found["flops_per_image"] == 2e13
    assert found["phases"]["rollout"]["total_bytes"] == 3 * GIB
    np.testing.assert_allclose(found["epoch_seconds"][0], compute + max(compute, 2.0))
    np.testing.assert_allclose(found["epoch_seconds"][1], 2 * compute / plan.LOW + 2.0)
    np.testing.assert_allclose(found["device_hours_per_epoch"][0], found["epoch_seconds"][0] * 16 / 3600)
    json.dumps(found)
    assert "v5e:4x4: 16 chips on 2 hosts" in plan.text(here, both, found)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ([], "--topology: is missing"),
        (["--topology=v5e:3x3"], "v5e is sold as"),
        (["--topology=v5e:2x2", "--check"], "--check: got --mode=plan"),
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
    for one in found["phases"].values():
        assert one["peak_bytes"] >= one["temp_bytes"] > 0 and one["flops"] > 0
    assert "rollout" in capsys.readouterr().out
