"""Regex rules over trees: the first match decides, and nothing is silently skipped."""

import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.rules import Rules

TREE = {"blocks": {"attn": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}}, "head": [4, 5]}


def test_the_first_matching_rule_decides():
    rules = Rules((r"attn/kernel$", "first"), (r"(kernel|bias|scale)$", "second"), (r"^head/\d", "third"))
    assert rules.match(TREE) == {
        "blocks": {"attn": {"kernel": "first", "bias": "second"}, "norm": {"scale": "second"}},
        "head": ["third", "third"],
    }


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="no rule matches 'blocks/norm/scale'"):
        Rules((r"(kernel|bias)$", 1), (r"head", 2)).match(TREE)


def test_a_rule_without_a_leaf_is_an_error_that_names_the_nearest_path():
    with pytest.raises(UserError, match=r'matches nothing \(try "blocks/norm/scale"'):
        Rules((r".", 1), (r"blocks/norms/scale$", 2)).match(TREE)


def test_a_rule_behind_a_wider_one_counts_as_used():
    assert set(Rules((r".", 1), (r"kernel$", 2)).match(TREE)["blocks"]["attn"].values()) == {1}


def test_values_may_be_any_object():
    assert Rules((r".", None)).match({"a": 1}) == {"a": None}
