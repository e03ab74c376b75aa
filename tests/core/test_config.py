import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import contradictions, resumable, schema
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError


def overridden(*pairs):
    values = configs.default()
    for name, text in pairs:
        configs.override(values, name, text)
    return configs.from_dict(values)


def test_the_defaults_are_valid_and_equal_the_dataclasses():
    assert configs.from_dict(configs.default()) == Config()
    assert configs.from_dict({}) == Config()


def test_a_config_survives_the_way_to_json_and_back():
    config = overridden(
        ("search.steps", "1,2"), ("rewards.compressibility", "-0.5"), ("prompts.members", "8"), ("seed", "3")
    )
    stored = json.loads(json.dumps(configs.to_dict(config)))
    assert configs.from_dict(stored) == config
    assert config.search.steps == (1, 2) and config.rewards == {"shapes": 1.0, "compressibility": -0.5}


def test_a_part_of_a_config_leaves_the_rest_to_the_defaults():
    assert configs.from_dict(ConfigDict({"train": {"epochs": 3}})).train == dataclasses.replace(
        Config().train, epochs=3
    )
    values = ConfigDict({"seed": 4})
    configs.override(values, "train.epochs", "3")
    configs.override(values, "rewards.shapes", "2")
    config = configs.from_dict(values)
    assert (config.seed, config.train.epochs, config.rewards) == (4, 3, {"shapes": 2.0})


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("train.epochs", "7", 7),
        ("train.learning_rate", "1e-3", 1e-3),
        ("train.learning_rate", "1", 1.0),
        ("log.tensorboard", "false", False),
        ("log.tensorboard", "TRUE", True),
        ("sampler.transition", "cps", "cps"),
        ("sampler.window.kind", "fixed", "fixed"),
        ("search.steps", "early", "early"),
        ("search.steps", "[1, 2]", (1, 2)),
        ("search.steps", "3", (3,)),
        ("search.steps", "(0,4,)", (0, 4)),
        ("adapter.targets", "attn.to_q,attn.to_k", ("attn.to_q", "attn.to_k")),
        ("prompts.negative", "blurry, dark", "blurry, dark"),
        ("prompts.negative", "", ""),
        ("pretrain.caption_noise", "0.2,0.1", (0.2, 0.1)),
    ],
)
def test_the_command_line_is_read_by_the_type_of_the_field(name, text, value):
    config = overridden((name, text))
    for part in name.split("."):
        config = getattr(config, part)
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize("section, field", [("train", "clip"), ("train", "epochs"), ("model", "path")])
def test_a_truth_is_neither_a_number_nor_a_text(section, field):
    with pytest.raises(UserError, match=f"{section}.{field}: got True, wanted"):
        configs.from_dict({section: {field: True}})


def test_reward_tables_grow_row_by_row_and_option_by_option():
    config = overridden(
        ("rewards.shapes.strict", "1"), ("rewards.compressibility", "0.1"), ("search_reward.shapes", "1")
    )
    assert config.rewards == {"shapes": {"weight": 1.0, "strict": 1.0}, "compressibility": 0.1}
    assert config.search_reward == {"shapes": 1.0}


def test_every_field_has_a_meaning_and_a_default_inside_its_bounds():
    seen = 0
    for name, cls in schema._sections(Config, ""):
        for field in dataclasses.fields(cls):
            if field.metadata:
                seen += 1
                assert field.metadata["doc"], f"{name}.{field.name}"
    assert seen == len(list(schema.flatten(configs.to_dict(Config(rewards={}, eval_rewards={}))))) + 3


def test_the_reference_names_every_field():
    text = schema.reference(Config)
    names = {n for n, _ in schema.flatten(configs.to_dict(Config())) if "reward" not in n}
    assert [n for n in names if f"`{n}`" not in text] == []


@pytest.mark.parametrize(
    "field", ["train.epochs", "log.every", "checkpoint.keep", "memory.train", "mesh.data"]
)
def test_a_run_may_be_taken_up_with_another(field):
    old = resumable.semantic(configs.to_dict(Config()))
    assert resumable.semantic(configs.to_dict(overridden((field, "5")))) == old


@pytest.mark.parametrize("field", ["seed", "train.warmup", "prompts.groups", "search.rounds", "eval.every"])
def test_a_run_may_not_be_taken_up_with_another(field):
    old = resumable.semantic(configs.to_dict(Config()))
    new = resumable.semantic(configs.to_dict(overridden((field, "4"))))
    assert {k for k in old if old[k] != new[k]} == {field}


def test_every_contradiction_names_a_field_that_exists():
    names = {n for n, _ in schema.flatten(configs.to_dict(Config()))} | {"rewards", "search_reward"}
    for _, message in contradictions.RULES:
        line = message.format(c=Config())
        assert line.split(":")[0] in names and "got" in line and len(line) <= 200


def test_the_first_contradiction_is_raised():
    with pytest.raises(UserError, match=r"updates_per_epoch: got 7, wanted a divisor of .* 48 × 24"):
        overridden(("train.updates_per_epoch", "7"))


def test_the_search_is_off_in_three_ways():
    on = overridden(("search.rounds", "2"))
    assert configs.searched_steps(on)
    for name, text in (("search.rounds", "0"), ("search.steps", "none"), ("search.members", "0")):
        assert not configs.searched_steps(overridden((name, text)))


def test_a_field_that_an_older_run_did_not_know_counts_with_its_default():
    known = configs.to_dict(overridden(("rewards.shapes", "2")))
    older = {**known, "train": {k: v for k, v in known["train"].items() if k != "half_life"}}
    assert resumable.semantic(older) == resumable.semantic(known)
    assert resumable.semantic(older)["rewards.shapes"] == 2
