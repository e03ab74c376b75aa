"""Both judges on true pictures, on pictures with one thing wrong, and on pictures made to cheat."""

import jax
import numpy as np
import pytest

from smart_grpo_jax.worlds.shapes import judge as first
from smart_grpo_jax.worlds.shapes import scenes
from smart_grpo_jax.worlds.shapes.grammar import TASKS
from smart_grpo_jax.worlds.shapes.render import GROUND
from smart_grpo_jax.worlds.shapes.second_judge import components, second_judge

COLOURED = ("counting", "colors", "position", "color_attr")


def edit(field, change):
    def apply(scene):
        values = getattr(scene, field).copy()
        return scene._replace(**{field: change(values)})

    return apply


def turn_first(bound):
    def change(values):
        values[:, 0] = (values[:, 0] + 1) % bound
        return values

    return change


def swap_places(values):
    return values[:, [1, 0, 2, 3]]


CORRUPTIONS = {
    "wrong colour": (edit("colour", turn_first(6)), COLOURED),
    "wrong shape": (edit("shape", turn_first(4)), TASKS),
    "missing object": (edit("count", lambda n: n - 1), TASKS),
    "extra object": (edit("count", lambda n: np.minimum(n + 1, 4)), TASKS),
    "wrong relation": (edit("position", swap_places), ("position",)),
}


def blurred(images, times):
    kernel = np.eye(24) / 2 + (np.eye(24, k=1) + np.eye(24, k=-1)) / 4
    kernel[0, 0] = kernel[-1, -1] = 0.75
    kernel = np.linalg.matrix_power(kernel, times)
    return np.einsum("ij,kl,bjlc->bikc", kernel, kernel, images).astype(np.float32)


def noisy(images, sd, seed=0):
    noise = np.random.default_rng(seed).normal(size=images.shape)
    return np.clip(images + sd * noise, 0, 1).astype(np.float32)


def test_true_pictures_pass_both_judges_in_all_tasks(clean, images, spec):
    graded, strict = clean
    assert set(spec[:, 0]) == set(range(6))
    assert strict.min() == 1.0 and graded.min() > 0.9
    graded, strict = second_judge(images, spec)
    assert strict.min() == 1.0 and graded.min() == 1.0


def test_the_second_judge_sees_the_scene(scene, images):
    found = components(images)
    for i, count in enumerate(scene.count):
        mine = found.image == i
        seen = sorted(zip(found.shape[mine], found.colour[mine], strict=True))
        assert seen == sorted(zip(scene.shape[i][:count], scene.colour[i][:count], strict=True))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_one_thing_wrong_fails_both_judges_and_lowers_the_grade(
    name, scene, spec, images, render, judge, clean
):
    corrupt, tasks = CORRUPTIONS[name]
    wrong = corrupt(scene)
    pictures = render(wrong)
    rows = np.isin(spec[:, 0], [TASKS.index(task) for task in tasks])
    rows &= np.abs(pictures - images).max((1, 2, 3)) > 0.1  # four objects have no room for an extra one
    assert rows.sum() >= 30
    graded, strict = judge(pictures, spec)
    assert strict[rows].max() == 0.0
    assert (graded < clean[0] - 0.1)[rows].all()
    assert second_judge(pictures, spec)[1][rows].max() == 0.0


@pytest.mark.parametrize("spoil, steps", [(blurred, (1, 3, 8)), (noisy, (0.05, 0.15, 0.3))])
def test_the_grade_falls_with_blur_and_with_noise(spoil, steps, images, spec, judge, clean):
    mean = clean[0].mean()
    for step in steps:
        # From one heavy blur to the next a blob may come to look like what was asked for; against its
        # clean picture only a circle gains, of which the judge is 96 % sure and which blur makes rounder.
        graded = judge(spoil(images, step), spec)[0]
        assert (graded < clean[0]).mean() > 0.98 and (graded - clean[0]).max() < 0.02
        assert graded.mean() < mean - 0.02
        mean = graded.mean()


@pytest.mark.parametrize("what", ["the prompt's object", "all kinds"])
def test_drawing_everything_everywhere_scores_low_in_every_task(what, scene, spec, render, judge):
    n = len(spec)
    rng = np.random.default_rng(0)
    total = np.zeros((n, 24, 24, 3), np.float32)
    for cells in ((0, 1, 2, 3), (4, 5, 6, 7), (8, 8, 8, 8)):
        cells = np.broadcast_to(cells, (n, 4))
        place = (np.stack([cells % 3, cells // 3], -1) + 0.5) * 8.0
        kinds = what == "all kinds"
        crowd = scene._replace(
            position=place.astype(np.float32),
            shape=rng.integers(0, 4, (n, 4)) if kinds else np.repeat(scene.shape[:, :1], 4, 1),
            colour=rng.integers(0, 6, (n, 4)) if kinds else np.repeat(scene.colour[:, :1], 4, 1),
            count=np.full(n, 1 if cells[0, 0] == 8 else 4),
        )
        total += render(
            crowd._replace(shape=crowd.shape.astype(np.int32), colour=crowd.colour.astype(np.int32))
        )
    graded, strict = judge(total - 2 * GROUND, spec)
    assert strict.max() == 0.0
    for task in range(6):
        assert graded[spec[:, 0] == task].mean() < 0.4, TASKS[task]
    assert second_judge(total - 2 * GROUND, spec)[1].max() == 0.0


def test_ghosts_and_texture_do_not_pay(scene, spec, images, render, judge, clean):
    ghost = render(scene._replace(position=24 - scene.position[:, ::-1], count=np.full_like(scene.count, 4)))
    with_ghost = np.clip(images + 0.4 * (ghost - GROUND), 0, 1)
    textured = np.clip(images + 0.2 * (np.indices((24, 24)).sum(0) % 2)[..., None], 0, 1).astype(np.float32)
    for cheat in (with_ghost, textured):
        assert (judge(cheat, spec)[0] < clean[0]).all()


def test_a_colour_between_two_is_worth_less_than_either(judge, render, scene, spec):
    asked = spec.copy()
    asked[:] = (3, 1, 0, 0, -1, -1, -1)  # a red circle
    alone = scene._replace(
        count=np.ones_like(scene.count), shape=np.zeros_like(scene.shape), colour=np.zeros_like(scene.colour)
    )
    red = render(alone)
    orange = red.copy()
    orange[..., 1] += 0.47 * (red[..., 0] - GROUND)
    assert judge(red, asked)[0].min() > 0.9
    graded, strict = judge(orange, asked)
    assert strict.max() == 0.0 and graded.max() < 0.75
    assert second_judge(orange, asked)[1].max() == 0.0


def test_wrong_prompts_score_low(images, spec, judge, clean):
    graded, strict = judge(images, np.roll(spec, 1, axis=0))
    assert graded.mean() < 0.3 and strict.mean() < 0.1 and clean[0].mean() > 0.95


def test_no_picture_gives_nan(judge, spec):
    shape = (len(spec), 24, 24, 3)
    rng = np.random.default_rng(0)
    pictures = [np.full(shape, value, np.float32) for value in (0.0, GROUND, 0.5, 1.0)]
    for picture in [*pictures, rng.random(shape, np.float32)]:
        for graded, strict in (judge(picture, spec), second_judge(picture, spec)):
            assert np.isfinite(graded).all() and graded.min() >= 0 and graded.mean() < 0.05
            assert strict.max() == 0.0


def test_the_noise_level_forgives_the_noise_of_one_step_decodes(images, spec, judge):
    pictures = noisy(images, 0.3)
    assert judge(pictures, spec, np.float32(0.8))[0].mean() > judge(pictures, spec)[0].mean() + 0.2
    level = np.full(len(spec), 0.8, np.float32)
    np.testing.assert_allclose(
        judge(pictures, spec, level)[0], judge(pictures, spec, np.float32(0.8))[0], atol=1e-6
    )  # the same arithmetic, broadcast


def test_the_judge_is_the_same_under_vmap(images, spec, clean):
    each = jax.jit(jax.vmap(first.judge, (0, None)))(np.stack([images[:8], images[8:16]]), spec[:8])
    np.testing.assert_allclose(each.graded[0], clean[0][:8], atol=1e-5)  # other shapes, other sums


def test_found_places_are_right_to_a_fifth_of_a_pixel(scene, images):
    found = jax.jit(first.detect)(images)
    away = np.linalg.norm(found.position[:, :, None] - scene.position[:, None], axis=-1).min(1)
    assert away[np.arange(scenes.OBJECTS) < scene.count[:, None]].max() < 0.2
