"""The published heads at their true shape, 768-1024-128-64-16-1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import torch_write
from smart_grpo_jax.hub.reward_weights import AESTHETIC_HEAD, HEAD_LAYERS
from smart_grpo_jax.hub.torch_files import open_tensors
from smart_grpo_jax.rewards import head

WIDTHS = (768, 1024, 128, 64, 16, 1)


def tensors(widths=WIDTHS, seed=0):
    """Random layers whose score has the size of the real one: |w| near 18, a bias near 5."""
    rng = np.random.default_rng(seed)
    out = {}
    for layer, before, after in zip(HEAD_LAYERS, widths[:-1], widths[1:], strict=True):
        gain = 18.0 if layer == HEAD_LAYERS[-1] else 1.0
        out[f"layers.{layer}.weight"] = gain * rng.normal(size=(after, before)) / before**0.5
        out[f"layers.{layer}.bias"] = 0.1 * rng.normal(size=after) + 5.2 * (layer == HEAD_LAYERS[-1])
    return {key: value.astype(np.float32) for key, value in out.items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch_write.write(path, tensors())
    return path


@pytest.fixture(scope="module")
def layers(stored):
    return head.load(AESTHETIC_HEAD, open_tensors(stored), 768)


@pytest.fixture(scope="module")
def vectors():
    x = np.random.default_rng(1).normal(size=(256, 768))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


def exact(x):
    """The layers in float64."""
    x = np.asarray(x, np.float64)
    for layer in HEAD_LAYERS:
        weights = tensors()
        x = x @ weights[f"layers.{layer}.weight"].T.astype(np.float64) + weights[f"layers.{layer}.bias"]
    return x[:, 0]


def test_folded_and_layered_agree_within_1e_5(layers, vectors):
    one, other = head.affine(head.folded(layers), vectors), head.layered(layers, vectors)
    assert np.std(exact(vectors)) > 0.1
    np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(one, exact(vectors), atol=1e-5)


def test_the_score_of_a_unit_vector_is_bounded_by_the_norm_of_w_and_reaches_it(layers, vectors):
    params = head.folded(layers)
    w, b = np.asarray(params["weight"], np.float64), float(params["bias"])
    bound = np.linalg.norm(w)
    scores = np.asarray(head.layered(layers, vectors))
    assert np.abs(scores - b).max() <= bound and np.abs(scores).max() <= bound + abs(b)
    best = jnp.asarray([w / bound, -w / bound], jnp.float32)
    np.testing.assert_allclose(head.layered(layers, best), [b + bound, b - bound], atol=1e-5 * bound)


def test_the_head_is_affine(layers, vectors):
    a, c = vectors[:128], vectors[128:]
    score = lambda x: np.asarray(head.layered(layers, x), np.float64)
    np.testing.assert_allclose(score(0.3 * a + 0.7 * c), 0.3 * score(a) + 0.7 * score(c), atol=1e-5)


def test_mean_and_std_are_folded_in(layers, vectors):
    plain, scaled = (
        head.affine(head.folded(layers), vectors),
        head.affine(head.folded(layers, 0.167, 1.033), vectors),
    )
    np.testing.assert_allclose(scaled, (np.asarray(plain, np.float64) - 0.167) / 1.033, atol=1e-5)


def test_a_head_in_bfloat16_would_drown_what_it_tells_apart(layers, vectors):
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layers)
    error = np.abs(
        np.asarray(head.layered(narrow, vectors.astype(jnp.bfloat16)), np.float64) - exact(vectors)
    )
    # a hundred times what folding costs: the reason that heads are float32 whatever the tower is
    assert error.max() > 1e-3
    assert head.folded(layers)["weight"].dtype == jnp.float32


def test_a_head_for_other_features_is_refused(stored):
    with pytest.raises(UserError, match=r"'layers.0.weight' has shape \(1024, 768\), wanted \(1024, 1024\)"):
        head.load(AESTHETIC_HEAD, open_tensors(stored), 1024)


def test_a_head_that_lacks_a_layer_or_gives_two_numbers_is_refused(tmp_path):
    some = tensors()
    del some["layers.6.weight"]
    torch_write.write(tmp_path / "cut.pth", some)
    with pytest.raises(UserError, match=r"the aesthetic head lacks 'layers.6.weight'"):
        head.load(AESTHETIC_HEAD, open_tensors(tmp_path / "cut.pth"), 768)
    torch_write.write(tmp_path / "two.pth", tensors((*WIDTHS[:-1], 2)))
    with pytest.raises(UserError, match=r"gives 2 numbers, wanted 1"):
        head.load(AESTHETIC_HEAD, open_tensors(tmp_path / "two.pth"), 768)
