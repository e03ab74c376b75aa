import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.data import prompts
from smart_grpo_jax.worlds.shapes import grammar


def write(tmp_path, content, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_file_has_one_prompt_per_line(tmp_path):
    found = prompts.load(write(tmp_path, "a cat\n\n  a   dog \r\na cat\nnaïve café\n"))
    assert found.prompts == ("a cat", "a dog", "naïve café")
    assert (found.skipped, found.repeats) == (0, 1) and not found.balanced


def test_a_missing_file_is_found_before_it_is_read(tmp_path):
    with pytest.raises(UserError, match=r"prompts\.source: got"):
        prompts.check(str(tmp_path / "no.txt"))
    with pytest.raises(UserError, match=r"eval\.source: got"):
        prompts.check(str(tmp_path), "eval.source")
    with pytest.raises(UserError, match="No such file"):
        prompts.load(str(tmp_path / "no.txt"))
    prompts.check(write(tmp_path, "a cat"))


@pytest.mark.parametrize("split", ["train", "heldout", "combinations"])
def test_the_splits_of_the_world_are_prompts_of_its_grammar(split):
    found = prompts.load(f"shapes:{split}")
    assert found.balanced and set(found.prompts) <= set(grammar.splits()[split])
    assert grammar.encode(list(found.prompts[:50])).shape == (50, 7)


def test_train_and_evaluation_share_no_prompt():
    train, heldout = (set(prompts.load(f"shapes:{s}").prompts) for s in ("train", "heldout"))
    assert not train & heldout


def test_an_unknown_split_names_the_nearest():
    with pytest.raises(UserError, match=r'got "shapes:trian" .try "train"'):
        prompts.load("shapes:trian")


def test_the_fingerprint_follows_the_prompts_and_their_order():
    one, other, same = (prompts.PromptSet("s", p).sha for p in (("a", "b"), ("b", "a"), ("a", "b")))
    assert one == same != other and len(one) == 16


def test_the_draw_follows_from_seed_and_epoch_alone():
    draw = prompts.epoch_groups(100, 8, seed=3, epoch=7)
    assert np.array_equal(draw, prompts.epoch_groups(100, 8, seed=3, epoch=7))
    assert not np.array_equal(draw, prompts.epoch_groups(100, 8, seed=4, epoch=7))
    assert not np.array_equal(draw, prompts.epoch_groups(100, 8, seed=3, epoch=8))


@pytest.mark.parametrize("count, groups", [(12, 4), (13, 4), (7, 7), (100, 3)])
def test_a_round_draws_no_prompt_twice_and_leaves_few_out(count, groups):
    rounds = count // groups
    for first in (0, rounds):
        drawn = np.concatenate([prompts.epoch_groups(count, groups, 0, first + e) for e in range(rounds)])
        assert len(set(drawn)) == rounds * groups and set(drawn) <= set(range(count))


def test_rounds_are_in_another_order():
    one, two = (
        np.concatenate([prompts.epoch_groups(12, 4, 0, e) for e in range(start, start + 3)])
        for start in (0, 3)
    )
    assert sorted(one) == sorted(two) and not np.array_equal(one, two)


def test_a_small_set_serves_many_groups():
    drawn = prompts.epoch_groups(3, 8, seed=0, epoch=2)
    assert len(drawn) == 8 and set(np.bincount(drawn, minlength=3)) <= {2, 3}


def test_an_evaluation_spreads_over_the_set():
    found = prompts.evaluation_items(prompts.PromptSet("s", tuple(map(str, range(100)))), 4)
    assert found == [prompts.Item(str(i), 0) for i in (0, 25, 50, 75)]
    assert len(prompts.evaluation_items(prompts.PromptSet("s", ("a", "b")), 5)) == 2


def test_an_evaluation_of_all_takes_each_prompt_once():
    found = prompts.evaluation_items(prompts.PromptSet("s", ("a", "b", "a"), balanced=True), 0)
    assert found == [prompts.Item("a", 0), prompts.Item("b", 0)]


def test_repeats_of_a_prompt_are_counted_so_that_they_get_other_noise():
    found = prompts.evaluation_items(prompts.PromptSet("s", ("a", "b", "a"), balanced=True), 5)
    assert found == [prompts.Item(t, r) for t, r in (("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1))]


def test_a_longer_evaluation_begins_with_the_shorter_one():
    world = prompts.load("shapes:heldout")
    assert prompts.evaluation_items(world, 48)[:12] == prompts.evaluation_items(world, 12)


def test_ids_of_prompts_are_their_own():
    world = prompts.load("shapes:train").prompts
    assert len({prompts.prompt_id(text) for text in set(world)}) == len(set(world))
    assert all(0 <= prompts.prompt_id(text) < 2**31 for text in world[:100])


def test_over_long_prompts_are_counted_in_batches():
    asked = []

    def truncated(texts):
        asked.append(len(texts))
        return sum(len(text) > 3 for text in texts)

    assert prompts.over_long(["a", "long", "longer"] * 500, truncated, batch=400) == 1000
    assert asked == [400, 400, 400, 300]
