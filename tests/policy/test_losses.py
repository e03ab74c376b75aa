import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.types import Endpoints, Transitions
from smart_grpo_jax.policy import losses


def endpoints(rows=24):
    ones = jnp.ones(rows)
    return Endpoints(
        jax.random.normal(jax.random.key(7), (rows, 2, 2, 3)), ones, ones, ones.astype(jnp.int32)
    )


def test_every_loss_that_a_config_may_name_is_there():
    choices = configs.Train.__dataclass_fields__["loss"].metadata["choices"]
    assert set(losses.LOSSES) == set(choices)


def test_stored_steps_carry_their_own_noise():
    move = jnp.zeros((4, 1, 2, 2, 3))
    stored = Transitions(move[:, 0], move, *(jnp.zeros((4, 1)),) * 5, jnp.zeros(4, jnp.int32))
    assert losses.draw(stored, jax.random.key(0)) == (None, None)


def test_endpoints_are_renoised_afresh_at_every_step():
    given = endpoints()
    (t, eps), (other, fresh) = (losses.draw(given, jax.random.key(i)) for i in (0, 1))
    assert np.all((t > 0.05) & (t <= 1)) and not np.array_equal(t, other)
    assert eps.shape == given.x0.shape and not np.isclose(eps, fresh).any()
    # spread: no gap, the ends joined, is more than three times the mean one
    places = np.sort((np.asarray(t) - 0.05) / 0.95)
    gaps = np.diff(np.append(places, places[0] + 1))
    assert gaps.max() < 3 / len(t)
    # and a row draws the same however many come after it
    few, noise = losses.draw(jax.tree.map(lambda a: a[:5], given), jax.random.key(0))
    assert np.array_equal(few, t[:5]) and np.array_equal(noise, eps[:5])
