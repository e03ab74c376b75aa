"""The bench of rewards: what it counts, what it does not pretend to know."""

import numpy as np
import pytest
import tiny_run

from smart_grpo_jax.core.types import Scores
from smart_grpo_jax.jobs import reward_bench
from smart_grpo_jax.rewards import base
from smart_grpo_jax.rewards.base import HostScores

PROMPTS = ["a", "b", "c"]


def linear():
    """A reward of one matrix product: 2 · 192 · 5 operations per image."""
    weights = np.ones((192, 5), np.float32)

    def score(params, images, ctx, t=None):
        value = (images.reshape(len(images), -1) @ params).sum(-1)
        return Scores(value, value == value, {})

    return base.Reward("linear", weights, base.no_prompt, score, uses_prompt=False)


def outside(values):
    """A reward in plain Python."""
    host = lambda images, prompts, ids: HostScores(np.asarray(values, np.float32), ("",) * 3, {})
    return base.Reward("host", {}, base.no_prompt, linear().score, uses_prompt=False, host=host)


def test_operations_weights_time_and_memory_are_measured(monkeypatch):
    monkeypatch.setattr(reward_bench, "SECONDS", 0.01)
    cost = reward_bench.measure("linear", linear(), (8, 8), PROMPTS)
    assert cost.flops == 2 * 192 * 5 and cost.parameters == 192 * 5
    assert cost.rate > 0 and cost.compile_seconds > 0 and cost.temporary >= 0
    assert f"{cost.flops * cost.rate / 1e12:.1%}" in reward_bench.text([cost], 3, 1e12)


def test_a_device_that_is_not_in_the_table_has_no_peak():
    cost = reward_bench.Cost("r", 10.0, 1e9, 1.0, 5, 2**20)
    assert "peak unknown" in reward_bench.text([cost], 3, None)


def test_a_reward_outside_the_graph_has_a_speed_and_nothing_else():
    cost = reward_bench.measure("host", outside([1, 2, 3]), (8, 8), PROMPTS)
    assert cost.rate > 0 and cost.flops is None and cost.temporary is None
    assert "outside the graph" in reward_bench.text([cost], 3, 1e12)
    broken = reward_bench.measure("host", outside([1, np.nan, 3]), (8, 8), PROMPTS)
    assert "failed" in reward_bench.text([broken], 3, 1e12)


@pytest.mark.parametrize(
    "overrides, wanted",
    [((), 16), (("memory.rollout=2",), 8), (("memory.reward=3",), 3), (("memory.reward=99",), 16)],
)
def test_the_batch_is_that_of_a_rollout(tmp_path, overrides, wanted):
    from smart_grpo_jax.flags import parse
    from smart_grpo_jax.main import MODES, load_config

    config = load_config(parse(tiny_run.command(tmp_path / "run", *overrides), MODES))
    assert reward_bench.batch_of(config) == wanted
    assert reward_bench.image_size(config) == (24, 24)


def test_the_command_prints_a_row_for_every_reward_that_the_config_names(tmp_path, capsys):
    overrides = ("search_reward.compressibility=1", "eval_rewards.shapes_aesthetic=0")
    assert tiny_run.run(tmp_path / "run", *overrides, mode="rewards", flags=["--bench"]) == 0
    printed = capsys.readouterr().out
    assert "16 images of 24x24 in a call" in printed and "peak unknown" in printed
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == [
        "shapes",
        "compressibility",
        "shapes_aesthetic",
    ]
