import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smart_grpo_jax.maths import rng


def bits(key):
    return np.asarray(jax.random.key_data(key))


def test_noise_does_not_depend_on_how_it_is_batched():
    """One by one, as one batch, as rows and columns of it, or on another order of the members."""

    def draw(prompt, member):
        return jax.random.normal(rng.at(rng.key(3, "noise", 5, prompt, member), 7), (4,))

    prompts, members = jnp.repeat(jnp.arange(3), 2), jnp.tile(jnp.arange(2), 3)
    single = np.stack([draw(int(p), int(m)) for p, m in zip(prompts, members, strict=True)])
    batch = jax.jit(jax.vmap(draw))
    np.testing.assert_array_equal(batch(prompts, members), single)
    order = np.array([4, 0, 5, 2])
    np.testing.assert_array_equal(batch(prompts[order], members[order]), single[order])
    nested = jax.vmap(lambda p: jax.vmap(lambda m: draw(p, m))(jnp.arange(2)))(jnp.arange(3))
    np.testing.assert_array_equal(nested.reshape(6, 4), single)


def test_every_index_and_stream_changes_the_key():
    grid = itertools.product((0, 1), rng.STREAMS, (0, 1), (0, 1), (0, 1))
    keys = [rng.key(*indices) for indices in grid]
    keys += [rng.at(keys[0], step, round) for step in range(3) for round in range(3)]
    seen = {bits(k).tobytes() for k in keys}
    assert len(seen) == len(keys)


def test_all_indices_may_be_traced():
    traced = jax.jit(lambda s, e, p, m, j, r: rng.at(rng.key(s, "search", e, p, m), j, r))(1, 2, 3, 4, 5, 6)
    np.testing.assert_array_equal(bits(traced), bits(rng.at(rng.key(1, "search", 2, 3, 4), 5, 6)))


def test_the_generator_is_fixed_whatever_the_default():
    assert jax.random.key_impl(rng.key(0, "init")) == "threefry2x32"
    default = jax.config.jax_default_prng_impl
    try:
        jax.config.update("jax_default_prng_impl", "rbg")
        assert jax.random.key_impl(rng.key(0, "init")) == "threefry2x32"
    finally:
        jax.config.update("jax_default_prng_impl", default)


def test_stream_numbers_are_fixed():
    """A renumbered stream would silently change what every old seed means."""
    assert rng.STREAMS == {
        "prompts": 0, "init": 1, "latent": 2, "noise": 3, "search": 4, "update": 5, "eval": 6, "dropout": 7,
        "pretrain": 8, "sample": 9,
    }  # fmt: skip
    assert bits(rng.key(0, "latent", 1, 2, 3)).tolist() == FIRST_KEY


FIRST_KEY = [3742994557, 3772097294]


def test_an_unknown_stream_names_the_nearest():
    with pytest.raises(ValueError, match='try "noise"'):
        rng.key(0, "nois")
