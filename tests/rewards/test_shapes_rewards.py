"""The rewards of the shapes world, and the file-size reward, on true and spoiled pictures."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards import base, compressibility, shapes_aesthetic
from smart_grpo_jax.worlds.shapes import grammar, scenes
from smart_grpo_jax.worlds.shapes.render import render

N = 128


@pytest.fixture(scope="module")
def world():
    def draw(key):
        spec = scenes.sample_prompts(key, N)
        return spec, render(scenes.sample_scene(key, spec))

    spec, images = jax.jit(draw)(jax.random.key(5))
    return grammar.texts(spec), np.asarray(images)


@pytest.fixture(scope="module")
def looks():
    return jax.jit(shapes_aesthetic.aesthetic)


def blurred(images, times):
    kernel = np.eye(24) / 2 + (np.eye(24, k=1) + np.eye(24, k=-1)) / 4
    kernel = np.linalg.matrix_power(kernel / kernel.sum(1, keepdims=True), times)
    return np.einsum("ij,kl,bjlc->bikc", kernel, kernel, images).astype(np.float32)


def test_the_shapes_reward_is_the_judge(world):
    texts, images = world
    reward = base.build("shapes")
    strict = base.build("shapes", strict=True)
    ctx = reward.prepare(texts)
    graded = jax.jit(reward.score)(reward.params, images, ctx)
    hard = jax.jit(strict.score)(strict.params, images, ctx)
    np.testing.assert_array_equal(graded.value, graded.parts["graded"])
    np.testing.assert_array_equal(hard.value, graded.parts["strict"])
    assert graded.value.min() > 0.9 and hard.value.min() == 1.0


@pytest.mark.parametrize("name", ["shapes", "shapes_aesthetic"])
def test_images_of_another_size_are_refused(name):
    with pytest.raises(UserError, match="images of 32x24, want 24x24"):
        base.load_reward(name)(np.zeros((1, 32, 24, 3), np.float32), ["a photo of a cross"])


def test_prompts_outside_the_grammar_are_refused():
    with pytest.raises(UserError, match='unknown word "cat"'):
        base.load_reward("shapes")(np.zeros((1, 24, 24, 3), np.float32), ["a photo of a cat"])


def test_true_pictures_look_good_and_spoiled_ones_worse(world, looks):
    images = world[1]
    rng = np.random.default_rng(0)
    good = np.asarray(looks(images).value)
    assert good.min() > 5 and good.max() < 10 and 7 < good.mean() < 9
    worse = [blurred(images, 1), blurred(images, 4), 0.08 + 0.5 * (images - 0.08)]
    worse += [np.clip(images + sd * rng.normal(size=images.shape), 0, 1) for sd in (0.05, 0.15, 0.4)]
    for spoiled in worse:
        value = np.asarray(looks(spoiled.astype(np.float32)).value)
        assert (value < good).mean() > 0.97 and value.mean() < good.mean() - 1


def test_more_blur_looks_worse(world, looks):
    means = [float(looks(blurred(world[1], times)).value.mean()) for times in (0, 1, 2, 4, 8)]
    assert means == sorted(means, reverse=True)


def test_no_picture_has_an_infinite_or_record_score(world, looks):
    rng = np.random.default_rng(0)
    shape = (N, 24, 24, 3)
    best = float(looks(world[1]).value.max())
    checks = np.broadcast_to((np.indices((24, 24)).sum(0) % 2)[..., None], shape).astype(np.float32)
    colours = rng.integers(0, 2, (N, 1, 1, 3)) * np.ones(shape)
    blocks = np.kron(rng.integers(0, 2, (N, 6, 6, 3)), np.ones((1, 4, 4, 1)))
    for images in (
        *(np.full(shape, v) for v in (0, 0.08, 0.5, 1)),
        rng.random(shape),
        checks,
        colours,
        blocks,
    ):
        value = np.asarray(looks(images.astype(np.float32)).value)
        assert np.isfinite(value).all() and value.max() < best


def test_the_stored_constants_are_those_of_renders(world):
    mean, precision = shapes_aesthetic.measure(world[1])
    spread = np.sqrt(np.diag(np.linalg.inv(shapes_aesthetic.PRECISION.astype(np.float64))))
    # 128 pictures: the mean scatters by a tenth of the spread, d² by about 0.5 around 5 features.
    assert (np.abs(mean - shapes_aesthetic.MEAN) < 0.4 * spread).all()
    d2 = shapes_aesthetic.distance(shapes_aesthetic.features(world[1]))
    assert 3.5 < float(d2.mean()) < 6.5
    assert (np.linalg.eigvalsh(precision) > 0).all()


def jpeg_kilobytes(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(np.round(image * 255).astype(np.uint8)).save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


def rank_correlation(a, b):
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return np.corrcoef(*ranks)[0, 1]


def pictures_of_varied_complexity(rng, count=48, size=40):
    """From flat to noise: sums of waves and grain of random strength."""
    y, x = np.mgrid[:size, :size] / size
    for _ in range(count):
        waves = np.zeros((3, size, size))
        for _ in range(rng.integers(0, 6)):
            along = rng.integers(-5, 6) * x + rng.integers(-5, 6) * y + rng.random((3, 1, 1))
            waves += rng.random() * np.sin(2 * np.pi * along)
        grain = rng.random() ** 3 * rng.normal(size=(3, size, size))
        yield np.clip(0.5 + 0.15 * waves + 0.2 * grain, 0, 1).transpose(1, 2, 0)


@pytest.mark.parametrize("quality", [50, 95])
def test_the_estimated_file_size_ranks_and_measures_like_real_files(quality):
    images = np.stack(list(pictures_of_varied_complexity(np.random.default_rng(0)))).astype(np.float32)
    real = np.array([jpeg_kilobytes(image, quality) for image in images])
    estimate = np.asarray(compressibility.kilobytes(images, quality))
    assert rank_correlation(real, estimate) > 0.97
    assert np.abs(np.log(estimate / real)).max() < 0.25  # a rule of thumb for Huffman codes: a quarter


def test_the_estimated_file_size_ranks_pictures_of_the_world(world):
    images = world[1]
    real = np.array([jpeg_kilobytes(image, 95) for image in images])
    assert rank_correlation(real, np.asarray(compressibility.kilobytes(images))) > 0.9


def test_compressibility_is_on_the_scale_of_flow_grpo_and_has_a_negation(world):
    texts, images = world
    simple = base.load_reward("compressibility")(images, texts)
    busy = base.load_reward("incompressibility")(images, texts)
    np.testing.assert_array_equal(simple, -busy)
    np.testing.assert_allclose(busy * 500, np.asarray(compressibility.kilobytes(images)), rtol=1e-5)


def test_quantisation_tables_are_those_that_pillow_writes():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG", quality=80)
    written = Image.open(buffer).quantization
    assert list(compressibility.quantisation(compressibility.LUMINANCE, 80).ravel()) == written[0]
    assert list(compressibility.quantisation(compressibility.CHROMINANCE, 80).ravel()) == written[1]


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_out_of_range_is_refused(quality):
    with pytest.raises(UserError, match="want 1 to 100"):
        base.build("compressibility", quality=quality)
