import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.worlds.shapes import grammar

ALL = [grammar.text(prompt) for prompt in grammar.all_prompts()]
SPLITS = grammar.splits()


def test_the_grammar_has_the_sizes_that_its_docstring_names():
    counts = {task: sum(p.task == task for p in grammar.all_prompts()) for task in grammar.TASKS}
    assert counts == {
        "single_object": 4, "two_object": 12, "counting": 72,
        "colors": 24, "position": 1920, "color_attr": 480,
    }  # fmt: skip
    assert len(set(ALL)) == len(ALL) == 2512


def test_text_and_meaning_and_rows_are_inverse_to_each_other():
    assert all(grammar.parse(text) == prompt for text, prompt in zip(ALL, grammar.all_prompts(), strict=True))
    assert grammar.texts(grammar.encode(ALL)) == ALL


def test_case_and_white_space_do_not_matter():
    assert grammar.parse("  A photo of\ta RED  circle ") == grammar.parse("a photo of a red circle")


def test_rows_say_what_the_text_says():
    rows = grammar.encode(["a photo of three blue crosses", "a photo of a red circle below a cyan square"])
    assert rows.dtype == np.int32
    assert rows.tolist() == [[2, 3, 2, 3, -1, -1, -1], [4, 1, 0, 0, 5, 1, 3]]
    assert grammar.encode([]).shape == (0, 7)


def test_words_are_all_used_and_all_listed():
    used = {word for text in ALL for word in text.split()}
    assert used == set(grammar.WORDS) and len(set(grammar.WORDS)) == len(grammar.WORDS)
    assert max(len(text.split()) for text in ALL) == grammar.LONGEST


@pytest.mark.parametrize(
    "text, word", [("a photo of a purple cross", "purple"), ("a foto of a cross", "foto")]
)
def test_an_unknown_word_is_named(text, word):
    with pytest.raises(UserError, match=f'unknown word "{word}"'):
        grammar.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a photo of a red circle left of a red square",
        "a photo of three circles",
        "a photo of a",
    ],
)
def test_known_words_in_another_order_are_refused_with_a_prompt_that_exists(text):
    with pytest.raises(UserError, match="want one of the six forms") as caught:
        grammar.parse(text)
    suggestion = str(caught.value).split('try "')[1].split('"')[0]
    assert suggestion in ALL and len(caught.value.line) <= 200


def test_a_row_outside_the_grammar_is_refused():
    with pytest.raises(UserError, match="row of the grammar"):
        grammar.texts(np.array([[0, 3, -1, 0, -1, -1, -1]]))


def test_splits_are_disjoint_and_cover_the_grammar():
    parts = [set(part) for part in SPLITS.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(ALL)
    assert set(SPLITS) == {"train", "heldout", "combinations"}


def test_every_split_holds_all_six_tasks():
    for part in SPLITS.values():
        assert {grammar.parse(text).task for text in part} == set(grammar.TASKS)


def test_held_out_combinations_never_occur_in_train_and_always_in_their_split():
    def held_out(text):
        return bool(grammar.bindings(grammar.parse(text)) & grammar.HELD_OUT)

    assert not any(held_out(text) for text in SPLITS["train"] + SPLITS["heldout"])
    assert all(held_out(text) for text in SPLITS["combinations"])


def test_heldout_prompts_are_made_of_combinations_seen_in_train():
    def seen(split):
        # "a square" alone is one of four prompts: held out whole, its parts are seen in other tasks.
        return {pair for text in SPLITS[split] for pair in grammar.bindings(grammar.parse(text))} - {
            frozenset(("alone", shape)) for shape in grammar.SHAPES
        }

    assert seen("heldout") <= seen("train")


def test_prompts_that_mean_the_same_are_in_the_same_split():
    a, b = "a photo of a red circle left of a green square", "a photo of a green square right of a red circle"
    assert grammar.meaning(grammar.parse(a)) == grammar.meaning(grammar.parse(b))
    homes = {}
    for name, part in SPLITS.items():
        for text in part:
            assert homes.setdefault(grammar.meaning(grammar.parse(text)), name) == name


def test_a_caller_cannot_change_the_splits():
    grammar.splits()["train"].clear()
    assert grammar.splits()["train"] == SPLITS["train"]
