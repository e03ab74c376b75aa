"""Rewards inside the graph: a whole Smart-GRPO epoch, search and all, never waits for the host.

ImageReward and the aesthetic predictor are the tiny ones that the package ships for its self-check.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.types import Scores
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import assemble, reward_examples, traced
from smart_grpo_jax.jobs.programs import programs_of
from smart_grpo_jax.policy import rollout
from smart_grpo_jax.rewards import base, mixture
from smart_grpo_jax.runtime.compile_cache import CompileCount
from smart_grpo_jax.runtime.mesh import replicated
from smart_grpo_jax.runtime.metrics import read

REWARDS = {
    "image_reward": {
        "weight": 1.0, "path": str(reward_examples.FIXTURES / "image_reward"), "vision_heads": 3,
    },
    "aesthetic": {"weight": 0.5, "path": str(reward_examples.FIXTURES / "aesthetic")},
}  # fmt: skip

TO_THE_HOST = ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv")
"""How a lowered program says that it talks to the host while it runs."""


@pytest.fixture(scope="module")
def run():
    values = configs.default()
    changes = {
        "model.path": str(tiny_run.one_layer()), "prompts.cache": "off", "prompts.groups": "2",
        "prompts.members": "3", "sampler.steps": "4", "sampler.guidance": "1", "search.rounds": "2",
        "search.candidates": "3", "search.elite": "0.67", "search.steps": "1,2", "adapter.kind": "lora",
        "adapter.rank": "2", "adapter.alpha": "4", "adapter.targets": "/attn/to_q$", "eval.prompts": "2",
    }  # fmt: skip
    for name, text in changes.items():
        configs.override(values, name, text)
    values.rewards, values.eval_rewards = REWARDS, {}
    return assemble.assemble(configs.from_dict(values))


def inputs(run, epoch):
    """All arguments of an epoch's programs on the device, as they are before the first of them starts."""
    config = run.config
    index = prompt_data.epoch_groups(len(run.prompts.prompts), config.prompts.groups, config.seed, epoch)
    texts = [run.prompts.prompts[i] for i in index]
    batch, real = assemble.make_batch(run, texts, len(texts), run.reward, range(len(texts)))
    made = (
        traced.rollout_knobs(config, run.times, epoch),
        traced.credit_masks(config, run.times, epoch, real),
        traced.update_knobs(config, run.times, epoch),
    )
    return batch, *jax.device_put(made, replicated(run.mesh))


def lowered(run, reward, batch, knobs):
    """The rollout of this run with another reward, before it is compiled."""
    params = run.rollout_params(run.state().params) | {
        "reward": reward.params,
        "search_reward": reward.params,
    }
    fns = dataclasses.replace(run.fns, score=reward.score, search_score=reward.score)
    other = dataclasses.replace(run, fns=fns)
    act = jax.jit(partial(rollout.act, other.fns, other.shape))
    return act.lower(params, knobs, batch).as_text()


def test_epochs_with_search_stay_on_the_device_and_share_one_program(run):
    programs, state = programs_of(run), run.state()
    built, rewards = [], []
    for epoch in range(4):
        batch, knobs, masks, update_knobs = inputs(run, epoch)
        params, frozen = run.rollout_params(state.params), run.frozen
        count = CompileCount()
        with jax.transfer_guard("disallow"):
            acted = programs.act(params, knobs, batch)
            experience = programs.credit(acted, masks)
            state, metrics = programs.learn(state, frozen, batch.cond, experience, update_knobs)
            jax.block_until_ready((state, metrics))
        built.append(count.total)
        rewards.append(np.asarray(acted.reward))
        assert acted.ok.all() and np.isfinite(acted.found.rewards[1:3]).all()
        assert np.ptp(acted.found.rewards[1]) > 0  # the candidates of the search are told apart
        parts = {name: np.asarray(part) for name, part in acted.parts.items()}
        np.testing.assert_allclose(
            acted.reward, parts["image_reward"] + 0.5 * parts["aesthetic"], rtol=1e-5, atol=1e-5
        )
        assert float(metrics["grad_norm"]) > 0
    assert built[0] >= 3 and built[1:] == [0, 0, 0]
    assert not np.array_equal(rewards[0], rewards[-1])


def test_the_guard_would_see_an_argument_that_comes_from_the_host(run):
    _, knobs, _, _ = inputs(run, 0)
    program = jax.jit(lambda knobs: knobs.noise_level + 1)
    program(knobs)
    with jax.transfer_guard("disallow"):
        program(knobs)
        with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"):
            program(knobs._replace(noise_level=np.float32(0.7)))


def test_the_program_of_the_search_has_no_word_for_the_host_and_a_callback_would_be_one(run):
    batch, knobs, _, _ = inputs(run, 0)
    text = lowered(run, run.reward, batch, knobs)
    assert not [word for word in TO_THE_HOST if word in text]

    def score(params, images, ctx, t=None):
        shape = jax.ShapeDtypeStruct(images.shape[:1], jnp.float32)
        value = jax.pure_callback(
            lambda x: np.asarray(x).mean((1, 2, 3)), shape, images, vmap_method="expand_dims"
        )
        return Scores(value, jnp.isfinite(value), {name: value for name in REWARDS})

    outside = lowered(run, dataclasses.replace(run.reward, score=score), batch, knobs)
    assert "callback" in outside


def test_the_parameters_are_arguments_and_no_constants_of_the_program(run):
    batch, knobs, _, _ = inputs(run, 0)
    reward = mixture.mixture(REWARDS)
    closed = dataclasses.replace(
        reward, score=lambda params, images, ctx, t=None: reward.score(reward.params, images, ctx, t)
    )
    plain, baked = (len(lowered(run, r, batch, knobs)) for r in (reward, closed))
    weights = sum(a.size for a in jax.tree.leaves(reward.params))
    assert baked - plain > weights  # more than a letter for every number that is written into the program


def test_scores_in_the_mixture_are_those_of_the_rewards_alone(run):
    prompts = list(run.prompts.prompts[:4])
    images = np.random.default_rng(0).uniform(size=(4, 24, 24, 3)).astype(np.float32)
    both = jax.jit(run.reward.score)(run.reward.params, images, run.reward.prepare(prompts), None)
    for name, entry in REWARDS.items():
        alone = base.load_reward(name, **mixture.options_of(entry))(images, prompts)
        np.testing.assert_allclose(both.parts[name], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_rewards_train_from_the_command_line(tmp_path, capsys):
    options = [
        f"rewards.{name}.{key}={value}" for name, entry in REWARDS.items() for key, value in entry.items()
    ]
    short = ("train.epochs=2", "eval.prompts=4", "eval.every=0", "rewards.shapes=0", "search.candidates=3")
    assert tiny_run.run(tmp_path / "run", *short, *options) == 0, capsys.readouterr().err
    rows = read(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert np.isfinite(row["train/reward"]) and row["train/failed"] == 0
        assert row["update/first_ratio_error"] <= 1e-6 and row["update/grad_norm"] > 0
    assert {"eval/image_reward", "eval/aesthetic"} <= set(rows[0])
    assert "WARNING" not in capsys.readouterr().out
