"""Preprocessing against Pillow, the image processor of transformers, and torch's float resize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.rewards.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    CROPS,
    HEIGHT,
    PIPELINES,
    WIDTH,
    cubic,
    digits,
    eight_bit_pass,
    float_pass,
    preprocess,
    resize_exact,
    resized,
)

KINDS = ("noise", "edges", "smooth")
SIZES = [
    (512, 512),  # shrinking
    (640, 384),
    (640, 640),
    (384, 640),
    (97, 131),  # growing, odd
    (64, 64),
    (24, 24),  # the embedded world
    (128, 640),
    (224, 300),  # one side is right already: that pass is skipped
    (300, 224),
    (224, 224),
    (224, 227),  # 3 to crop: the two rules differ
    (227, 224),
    (224, 231),
]


def picture(kind, height, width, seed=0):
    """One image with values out of [0, 1] in places."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[:height, :width]
    if kind == "noise":
        image = rng.uniform(-0.2, 1.2, (height, width, 3))
    elif kind == "edges":
        image = np.kron(
            rng.choice([-0.3, 0, 1, 1.3], (height // 5 + 1, width // 7 + 1, 3)), np.ones((5, 7, 1))
        )
        image = image[:height, :width]
    else:
        image = np.stack([y / height, x / width, (np.sin(x / 30 + y / 50) + 1) / 2], -1)
    return image.astype(np.float32)


def eight_bit(image):
    """flow_grpo's rounding: half to even, and only then the clamp."""
    return np.clip(np.round(image * np.float32(255)), 0, 255).astype(np.uint8)


def by_pillow(image, size, rule):
    """Shorter side to `size` by Pillow, centre crop; levels of 255.

    One call per axis, width first: in one call Pillow 13 takes the height of images taller than 2:1 first,
    up to 15 levels from what every release before gave.
    """
    short = min(image.shape[:2])
    height, width = [int(size * side / short) for side in image.shape[:2]]
    large = Image.fromarray(eight_bit(image))
    for shape in [(width, large.height), (width, height)]:
        large = large.resize(shape, Image.Resampling.BICUBIC)
    top, left = [round((n - size) / 2) if rule == "tv" else (n - size) // 2 for n in (height, width)]
    return np.asarray(large, np.float64)[top : top + size, left : left + size]


def levels(tower, mean=CLIP_MEAN, std=CLIP_STD):
    """The input of a tower, back in levels of 255."""
    return (np.asarray(tower, np.float64) * np.array(std) + np.array(mean)) * 255


@pytest.mark.parametrize(
    "height, width, rule", [*[(*s, "tv") for s in SIZES], *[(*s, "hf") for s in SIZES[-5:]]]
)
def test_every_pixel_is_pillows(height, width, rule):
    images = np.stack([picture(kind, height, width) for kind in KINDS])
    got = jax.jit(lambda images: preprocess(images, 224, rule=rule))(images)
    assert got.dtype == jnp.float32
    for kind, image, tower in zip(KINDS, images, got, strict=True):
        want = by_pillow(image, 224, rule)
        assert want.std() > 10, kind
        # The integers are Pillow's own, so no pixel differs by half a level; 1e-4 is float32's normalisation.
        assert np.abs(levels(tower) - want).max() < 1e-4, kind


def test_one_call_of_pillow_is_the_same_up_to_two_to_one():
    for height, width in [(512, 512), (80, 48), (64, 32), (32, 64), (24, 300), (24, 24)]:
        image = picture("edges", height, width)
        rows, columns = resized(height, width, 32)
        once = Image.fromarray(eight_bit(image)).resize((columns, rows), Image.Resampling.BICUBIC)
        got = resize_exact(jnp.asarray(eight_bit(image), jnp.float32)[None], rows, columns)[0]
        np.testing.assert_array_equal(got, np.asarray(once))


def test_other_sizes_of_the_tower_are_pillows_too():
    for size, height, width in [(32, 24, 24), (32, 64, 80), (16, 113, 30), (336, 64, 100), (8, 300, 30)]:
        images = np.stack([picture(kind, height, width) for kind in KINDS])
        got = preprocess(images, size, rule="hf")
        want = np.stack([by_pillow(image, size, "hf") for image in images])
        assert np.abs(levels(got) - want).max() < 1e-4


def test_the_crop_rules_differ_exactly_where_three_are_left_over_a_multiple_of_four():
    differ = [n for n in range(64) if CROPS["tv"](n) != CROPS["hf"](n)]
    assert differ == [n for n in range(64) if n % 4 == 3]
    image = picture("noise", 224, 227)[None]
    assert np.abs(preprocess(image, 224, rule="tv") - preprocess(image, 224, rule="hf")).max() > 1


def test_a_single_float_pass_would_not_do():
    """The control: floats with one rounding at the end miss Pillow on hard edges."""
    image = picture("edges", 128, 128)
    want = by_pillow(image, 224, "hf")
    fast = levels(preprocess(image[None], 224, rule="hf", mode="fast")[0])
    assert np.abs(fast - want).max() > 2
    exact = levels(preprocess(image[None], 224, rule="hf")[0])
    assert np.abs(exact - want).max() < 1e-4


def test_the_longer_side_is_truncated():
    assert resized(300, 401, 224) == (224, int(224 * 401 / 300)) == (224, 299)
    assert resized(401, 300, 224) == (299, 224)
    for height, width in np.random.default_rng(0).integers(1, 3000, (500, 2)).tolist():
        want = [int(224 * side / min(height, width)) for side in (height, width)]
        assert resized(height, width, 224) == tuple(want)


def test_the_digits_are_the_weights_in_units_of_two_to_the_minus_22():
    for before, after in [(512, 224), (64, 224), (225, 224), (3, 7)]:
        parts = [part.astype(np.int64) for part in digits(before, after)]
        assert all(np.abs(part).max() <= 128 for part in parts)
        whole = parts[0] + 256 * parts[1] + 65536 * parts[2]
        assert np.abs(whole - cubic(before, after) * 2**22).max() <= 0.5
        # Partial sums of pixel × digit stay where float32 counts every integer.
        assert max(np.abs(part).sum(1).max() for part in parts) * 255 < 2**24


def test_image_processors_of_transformers_give_the_same_numbers():
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "CLIPImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no processor on Pillow")
    for height, width in [(512, 512), (64, 64), (224, 227), (231, 224), (300, 401)]:
        image = picture("noise", height, width)
        want = processor()(images=Image.fromarray(eight_bit(image)), return_tensors="np")["pixel_values"][0]
        got = PIPELINES["clip"](image[None], 224)[0]
        # Another order of the same float32 operations on equal 8-bit pixels; one level is 0.0142.
        np.testing.assert_allclose(got, want.transpose(1, 2, 0), atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("height, width", [(512, 512), (64, 64), (300, 401), (224, 227)])
def test_hps_resizes_floats_and_keeps_the_overshoot(height, width):
    torch = pytest.importorskip("torch")
    image = picture("edges", height, width)
    tensor = torch.from_numpy(eight_bit(image)).permute(2, 0, 1)[None].double() / 255
    shape = resized(height, width, 224)
    large = torch.nn.functional.interpolate(tensor, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    top, left = [round((n - 224) / 2) for n in shape]
    want = large.numpy()[top : top + 224, left : left + 224]
    got = levels(PIPELINES["hps"](image[None], 224)[0]) / 255
    # 2e-3 levels of 255: float32 sums of up to 40 taps against float64.
    assert np.abs(got - want).max() * 255 < 2e-3
    if (height, width) != (224, 227):  # which is not resized at all
        assert want.max() > 1.02 and want.min() < -0.02


def test_the_first_rounding_is_half_to_even_and_then_clamped():
    values = np.array([0.5, 1.5, 2.5, 3.49, -0.2 * 255, 1.2 * 255, 254.5], np.float64) / 255
    image = np.broadcast_to(values.astype(np.float32)[None, :, None], (7, 7, 3))
    want = [0, 2, 2, 3, 0, 255, 254]
    assert np.allclose(levels(preprocess(image[None], 7, rule="tv"))[0, 0, :, 0], want, atol=1e-4)
    infinite = np.where(image > 1, np.inf, np.where(image < 0, -np.inf, image))
    assert np.allclose(levels(preprocess(infinite[None], 7, rule="tv"))[0, 0, :, 0], want, atol=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("fast", [False, True])
def test_an_image_with_a_nan_is_nan_and_its_neighbours_are_not(name, fast):
    images = np.stack([picture("smooth", 40, 30)] * 3)
    clean = PIPELINES[name](images, 16, fast=fast)
    images[1, 5, 7, 2] = np.nan
    got = PIPELINES[name](images, 16, fast=fast)
    assert np.isnan(got[1]).all()
    np.testing.assert_array_equal(got[::2], clean[::2])


def test_vmap_and_jit_change_nothing():
    images = np.stack([picture(kind, 40, 52) for kind in KINDS])
    plain = preprocess(images, 32, rule="tv")
    mapped = jax.vmap(lambda image: preprocess(image[None], 32, rule="tv")[0])(images)
    np.testing.assert_array_equal(mapped, plain)
    nested = jax.jit(jax.vmap(lambda pair: preprocess(pair, 32, rule="tv")))(np.stack([images, images]))
    # Compiled as one, division by 255 and by std may be reordered: one unit in the last place.
    np.testing.assert_allclose(nested[1], plain, rtol=3e-7, atol=3e-7)


def test_nothing_goes_through_the_host():
    images = jax.device_put(np.stack([picture(kind, 40, 52) for kind in KINDS]))
    with jax.transfer_guard("disallow"):
        got = jax.jit(lambda images: PIPELINES["image_reward"](images, 32))(images)
    np.testing.assert_array_equal(np.isfinite(got), True)


def test_bfloat16_images_are_judged_as_they_are():
    images = jnp.asarray(picture("smooth", 40, 52))[None].astype(jnp.bfloat16)
    got = preprocess(images, 32, rule="tv")
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, preprocess(images.astype(jnp.float32), 32, rule="tv"))


@pytest.mark.parametrize("mode", ["exact", "fast", "float"])
def test_rounding_lets_the_gradient_of_the_unrounded_arithmetic_through(mode):
    """Values well inside the range, so that neither clip is active."""
    images = jnp.asarray(0.4 + 0.2 * picture("smooth", 20, 24))[None]
    probe = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)

    def rounded(images):
        return (probe * preprocess(images, 16, rule="tv", mode=mode)).sum()

    def unrounded(images):
        pixels = float_pass(float_pass(255 * images, 19, WIDTH), 16, HEIGHT)[:, :, 2:18]
        return (probe * (pixels / 255 - jnp.asarray(CLIP_MEAN)) / jnp.asarray(CLIP_STD)).sum()

    got, want = jax.grad(rounded)(images), jax.grad(unrounded)(images)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_clipped_pixels_have_no_gradient():
    images = jnp.full((1, 8, 8, 3), 1.5).at[:, :4].set(0.5)
    slope = jax.grad(lambda images: preprocess(images, 8, rule="tv").sum())(images)
    assert (slope[:, 4:] == 0).all() and (slope[:, :4] > 1).all()


def test_whole_levels_stay_whole_between_the_passes():
    pixels = jnp.round(255 * jnp.clip(jnp.asarray(picture("noise", 30, 50)), 0, 1))[None]
    once = eight_bit_pass(pixels, 20, WIDTH)
    assert (once == jnp.round(once)).all() and 0 <= once.min() and once.max() <= 255
    np.testing.assert_array_equal(resize_exact(pixels, 12, 20), eight_bit_pass(once, 12, HEIGHT))
    np.testing.assert_array_equal(resize_exact(pixels, 30, 50), pixels)


def test_unknown_words_and_impossible_sizes_cost_one_line():
    image = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(UserError, match="rule: got 'tf'"):
        preprocess(image, 8, rule="tf")
    with pytest.raises(UserError, match="mode: got 'exakt', try \"exact\""):
        preprocess(image, 8, rule="tv", mode="exakt")
    with pytest.raises(UserError, match="size 0"):
        preprocess(image, 0, rule="tv")
