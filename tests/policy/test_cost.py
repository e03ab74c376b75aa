import dataclasses

import toy_policy as toy

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.policy import cost


def config(**sampler):
    base = Config()
    return dataclasses.replace(
        base,
        sampler=dataclasses.replace(base.sampler, **({"guidance": 4.5} | sampler)),
        prompts=dataclasses.replace(base.prompts, groups=toy.GROUPS, members=toy.MEMBERS),
        search=dataclasses.replace(base.search, rounds=2, candidates=4),
    )


def test_guidance_costs_a_second_call():
    assert [cost.calls(g) for g in (0, 0.5, 1, 1.5, 7)] == [1, 1, 1, 2, 2]


def test_an_epoch_adds_sampling_search_and_learning():
    images, steps = toy.GROUPS * toy.MEMBERS, toy.STEPS
    told = cost.epoch(toy.shape(), toy.recipe(), config(), toy.masks(searched=[1, 2]))
    tried = images * 2 * 2 * 4
    assert told == {
        "velocity": images * steps * 2 + tried * 2 + images * (steps - 1) * 2,
        "backward": images * (steps - 1) * 2,
        "decode": images + tried,
        "reward": images + tried,
        "images": images,
    }


def test_without_a_searched_step_nothing_is_paid_for_the_search():
    plain = cost.epoch(toy.shape(), toy.recipe(), config(), toy.masks())
    none = cost.epoch(toy.shape(searched_members=0), toy.recipe(), config(), toy.masks())
    assert plain == none


def test_padding_is_not_counted():
    real = [True, True, True, False]
    padded = cost.epoch(toy.shape(), toy.recipe(), config(), toy.masks(searched=[1], real=real))
    assert padded == cost.epoch(toy.shape(), toy.recipe(), config(), toy.masks(searched=[1]))


def test_a_reference_and_more_passes_cost_more_forwards():
    base = cost.learning(toy.recipe(), config(guidance=1.0), 3, 4)
    kl = cost.learning(toy.recipe(use_kl=True), config(guidance=1.0), 3, 4)
    twice = cost.learning(toy.recipe(passes=2), config(guidance=1.0), 3, 4)
    assert kl["velocity"] == 2 * base["velocity"] and kl["backward"] == base["backward"]
    assert twice == {name: 2 * count for name, count in base.items()}
    free = cost.learning(toy.recipe(loss="nft"), config(), 3, 4)
    assert (free["velocity"], free["backward"]) == (2 * 12, 12)


def test_sums_by_name():
    assert cost.add({"velocity": 1}, {"velocity": 2, "images": 3}) == cost.NOTHING | {
        "velocity": 3,
        "images": 3,
    }


def test_images_seen_times_calls_are_the_calls_of_an_epoch():
    """Two views of one epoch: images through each part, and network calls."""
    masks, settings = toy.masks(searched=[1, 2]), config()
    for shape in (toy.shape(), toy.shape(one_step_rewards=True), toy.shape(lookahead=3)):
        seen = cost.images_seen(shape, toy.recipe(), settings, masks)
        told = cost.epoch(shape, toy.recipe(), settings, masks)
        assert (seen["path"] + seen["forecast"] + seen["learned"]) * 2 == told["velocity"]
        assert seen["judged"] + seen["search"] == told["reward"] and seen["learned"] * 2 == told["backward"]
        assert seen["unfinished"] == seen["judged"] - told["images"]
