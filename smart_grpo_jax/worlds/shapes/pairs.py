"""Two pictures for one prompt, of which the first is better: what the world's learned reward is taught with.

The second picture shows another scene (a wrong attribute, count, relation or a different prompt), or is the
same scene badly drawn: blurred, noisy, pale, with a ghost of another scene, or with a cell wiped out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from smart_grpo_jax.worlds.shapes import scenes
from smart_grpo_jax.worlds.shapes.judge import judge
from smart_grpo_jax.worlds.shapes.render import GROUND, render
from smart_grpo_jax.worlds.shapes.scenes import CELL, CELLS, SIZE

FLAWS = ("blur", "noise", "pale", "ghost", "wiped")
FLAWED_SHARE = 0.35
"""Part of the pairs whose second picture is badly drawn; in the others it shows the wrong thing."""


class Pairs(NamedTuple):
    """n prompts with a better and a worse picture each; `valid` where the judge agrees."""

    spec: Int[Array, "n 7"]
    better: Float[Array, "n 24 24 3"]
    worse: Float[Array, "n 24 24 3"]
    flawed: Bool[Array, " n"]
    valid: Bool[Array, " n"]


def draw(key: Array, n: int) -> Pairs:
    """n random pairs of rendered pictures."""
    prompt_key, good_key, wrong_key, bad_key, flaw_key, kind_key = jax.random.split(key, 6)
    spec = scenes.sample_prompts(prompt_key, n)
    better = render(scenes.sample_scene(good_key, spec))
    wrong = render(scenes.sample_scene(bad_key, scenes.corrupt(wrong_key, spec, 1.0)))
    flawed = jax.random.bernoulli(kind_key, FLAWED_SHARE, (n,))
    worse = jnp.where(flawed[:, None, None, None], flaw(flaw_key, better, wrong), wrong)
    # A redrawn attribute may be the old one, and an unsaid one may have changed: no lesson in that.
    valid = flawed | (judge(worse, spec).strict < 0.5)
    return Pairs(spec, better, worse, flawed, valid)


def flaw(
    key: Array, images: Float[Array, "n 24 24 3"], others: Float[Array, "n 24 24 3"]
) -> Float[Array, "n 24 24 3"]:
    """Each picture with one flaw of random strength."""
    kind_key, strength_key, noise_key, cell_key = jax.random.split(key, 4)
    n = len(images)
    kind = jax.random.randint(kind_key, (n, 1, 1, 1), 0, len(FLAWS))
    strength = jax.random.uniform(strength_key, (n, 1, 1, 1), minval=0.25, maxval=1.0)
    noise = jax.random.normal(noise_key, images.shape)
    cell = jax.random.randint(cell_key, (n, 1, 1), 0, CELLS**2)
    y, x = np.divmod(np.arange(SIZE**2), SIZE)
    place = jnp.asarray((y // CELL * CELLS + x // CELL).reshape(1, SIZE, SIZE))
    hit = (place == cell)[..., None]
    grey = images.mean(-1, keepdims=True)
    drawn = (
        images + strength * (blurred(images) - images),
        images + 0.35 * strength * noise,
        images + strength * 0.8 * (grey - images),
        images + 0.6 * strength * (others - images),
        jnp.where(hit, GROUND + 0.3 * strength * jnp.abs(noise), images),
    )
    return jnp.clip(jnp.select([kind == i for i in range(len(FLAWS))], drawn), 0.0, 1.0)


def blurred(images: Float[Array, "n 24 24 3"]) -> Float[Array, "n 24 24 3"]:
    """A 5 x 5 box, edges repeated."""
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    ones = jnp.ones((), images.dtype)
    summed = jax.lax.reduce_window(padded, 0.0 * ones, jax.lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "VALID")
    return summed / 25
