import jax
import numpy as np

from smart_grpo_jax.worlds.shapes import grammar, scenes
from smart_grpo_jax.worlds.shapes.render import GROUND, PALETTE


def test_sampled_prompts_are_of_the_grammar_in_equal_task_shares():
    spec = np.asarray(scenes.sample_prompts(jax.random.key(0), 6000))
    grammar.texts(spec)
    shares = np.bincount(spec[:, 0], minlength=6) / len(spec)
    assert np.abs(shares - 1 / 6).max() < 0.02  # four standard deviations of a share of 6,000


def test_sampling_from_a_table_stays_in_it():
    table = grammar.encode(grammar.splits()["heldout"])
    drawn = set(grammar.texts(scenes.sample_prompts(jax.random.key(1), 500, table)))
    assert drawn <= set(grammar.splits()["heldout"]) and len(drawn) > 50


def test_scenes_satisfy_their_prompts(spec, scene):
    for row, x, shape, colour, count in zip(
        spec, scene.position, scene.shape, scene.colour, scene.count, strict=True
    ):
        task, n, c1, s1, c2, s2, relation = row
        assert count == (2 if s2 >= 0 else n)
        first = range(n) if s2 < 0 else (0,)
        assert all(shape[i] == s1 and (c1 < 0 or colour[i] == c1) for i in first), grammar.TASKS[task]
        if s2 >= 0:
            assert shape[1] == s2 and (c2 < 0 or colour[1] == c2)
        if relation >= 0:
            dx, dy = x[1] - x[0]
            along, across = ((dx, dy), (-dx, dy), (dy, dx), (-dy, dx))[relation]
            assert along >= 7 and along > abs(across)


def test_objects_lie_in_cells_of_their_own(scene):
    cells = np.floor(scene.position / scenes.CELL).astype(int)
    assert all(len(set(map(tuple, row))) == scenes.OBJECTS for row in cells)
    offset = np.abs(scene.position - (cells + 0.5) * scenes.CELL).max(-1)
    assert (offset + scene.radius <= scenes.REACH + 1e-5).all()
    assert (offset <= scenes.JITTER + 1e-5).all()


def test_pictures_are_in_range_on_a_plain_ground(images):
    assert images.dtype == np.float32 and images.shape[1:] == (24, 24, 3)
    assert images.min() >= 0 and images.max() <= 1
    still = np.abs(images - GROUND).max(-1) < 1e-6
    assert still.mean((1, 2)).min() > 0.6  # four large objects leave two thirds of the picture


def test_the_middle_of_an_object_has_its_colour(scene, images):
    rows = np.arange(len(images))
    x, y = np.floor(scene.position[:, 0]).astype(int).T
    want = PALETTE[scene.colour[:, 0]] * scene.brightness[:, 0, None]
    np.testing.assert_allclose(images[rows, y, x], want, atol=1e-5)  # fully covered: exact up to rounding


def test_order_of_objects_does_not_change_the_picture(scene, images, render):
    turned = scene.count == 2
    order = np.where(turned[:, None], [1, 0, 2, 3], [0, 1, 2, 3])
    moved = scenes.Scene(
        position=np.take_along_axis(scene.position, order[..., None], 1),
        shape=np.take_along_axis(scene.shape, order, 1),
        colour=np.take_along_axis(scene.colour, order, 1),
        radius=np.take_along_axis(scene.radius, order, 1),
        count=scene.count,
        brightness=np.take_along_axis(scene.brightness, order, 1),
    )
    np.testing.assert_allclose(render(moved), images, atol=1e-6)  # one float32 rounding of the sum


def test_caption_noise_keeps_the_grammar_and_the_share():
    spec = scenes.sample_prompts(jax.random.key(0), 3000)
    corrupt = jax.jit(scenes.corrupt)
    for probability in (0.0, 0.3, 1.0):
        noisy = np.asarray(corrupt(jax.random.key(3), spec, probability))
        grammar.texts(noisy)
        changed = (noisy != np.asarray(spec)).any(1).mean()
        # A redraw may give the old value back, so fewer rows change than are drawn.
        assert changed <= probability + 0.03 and changed >= 0.6 * probability
