"""How well drawn a picture of the shapes world looks, whatever the prompt: a closed form on 1 ... 10.

Five features, each turned into a concave, saturating term, so that more of the same pays less and less:
colourfulness (Hasler and Suesstrunk), contrast, crispness (strong edges, no noise), balance (figures
away from the border and around the middle) and a uniform ground. A picture whose features together are
unlike those of true renders loses: without that, each term alone could be driven to where no picture is.

    score = 1 + 9 Σ w_i term_i - log(1 + d² / 5)        d²: Mahalanobis distance to the renders
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards.base import Reward, no_prompt, without_weights
from smart_grpo_jax.rewards.shapes import check_size
from smart_grpo_jax.worlds.shapes.render import GROUND
from smart_grpo_jax.worlds.shapes.scenes import SIZE

FEATURES = ("colour", "contrast", "crispness", "balance", "ground")
SCALE = np.array([0.10, 0.06, 0.065, 0.5, 0.25], np.float32)
"""Where each term has used up 63 % of its range; about half of what renders have."""
WEIGHT = np.array([0.2, 0.2, 0.3, 0.1, 0.2], np.float32)

MEAN = np.array([0.2342, 0.1106, 0.1206, 0.6984, 0.5541], np.float32)
PRECISION = np.array(
    [
        [1005.0, -357.3, -311.0, -28.6, 325.5],
        [-357.3, 1380.5, -652.9, -19.0, -7.9],
        [-311.0, -652.9, 2077.1, 16.3, -69.8],
        [-28.6, -19.0, 16.3, 33.4, 11.8],
        [325.5, -7.9, -69.8, 11.8, 227.0],
    ],
    np.float32,
)
"""Mean and inverse covariance of the features: `measure` of 1,024 renders."""

STEPS = 3 * SIZE * (SIZE - 1)
FLAT_WIDTH, GROUND_WIDTH = 0.02, 0.02
NOISE_SCALE, ROUGH_SCALE = 0.01, 0.02
EPS = 1e-6


def features(images: Float[Array, "b 24 24 3"]) -> Float[Array, "b 5"]:
    """The five features; smooth, and finite for every picture in [0, 1]."""
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    rg, yb = red - green, (red + green) / 2 - blue
    spread = jnp.sqrt(rg.var((1, 2)) + yb.var((1, 2)) + EPS)
    colour = spread + 0.3 * jnp.sqrt(rg.mean((1, 2)) ** 2 + yb.mean((1, 2)) ** 2 + EPS)
    light = images.mean(-1)
    contrast = jnp.sqrt(light.var((1, 2)) + EPS)

    # Few strong steps have a large mean square for their mean: blur lowers it. Between them nothing may
    # move: noise shows in the steps that are no edges.
    down, right = jnp.diff(images, axis=1), jnp.diff(images, axis=2)
    steps = jnp.concatenate([down.reshape(-1, STEPS), right.reshape(-1, STEPS)], axis=1) ** 2
    flat = jnp.exp(-steps / FLAT_WIDTH)
    noise = jnp.sqrt((flat * steps).sum(1) / (flat.sum(1) + 1.0) + EPS)
    crispness = steps.mean(1) / (jnp.sqrt(steps + EPS).mean(1) + 0.01) / (1 + noise / NOISE_SCALE)

    figure = ((images - GROUND) ** 2).sum(-1)
    mass = figure.sum((1, 2)) + 0.1
    axis = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    away = ((figure.sum(1) @ axis / mass) ** 2 + (figure.sum(2) @ axis / mass) ** 2).astype(jnp.float32)
    border = np.ones((SIZE, SIZE), np.float32)
    border[1:-1, 1:-1] = 0
    balance = jnp.exp(-away) - (figure * border).sum((1, 2)) / mass

    near = jnp.exp(-figure / GROUND_WIDTH)
    rough = jnp.sqrt((near * figure).sum((1, 2)) / (near.sum((1, 2)) + 1.0) + EPS)
    ground = near.mean((1, 2)) / (1 + rough / ROUGH_SCALE)
    return jnp.stack([colour, contrast, crispness, balance, ground], -1)


def distance(values: Float[Array, "b 5"]) -> Float[Array, " b"]:
    """Squared Mahalanobis distance of features to those of renders."""
    away = values - MEAN
    return jnp.maximum(jnp.einsum("bi,ij,bj->b", away, PRECISION, away), 0.0)


def aesthetic(images: Float[Array, "b 24 24 3"]) -> Scores:
    """Score and its terms, each term in [0, 1]."""
    images = jnp.clip(images.astype(jnp.float32), 0.0, 1.0)
    values = features(images)
    terms = 1 - jnp.exp(-jnp.maximum(values, 0.0) / SCALE)
    unlike = jnp.log1p(distance(values) / len(FEATURES))
    value = 1 + 9 * terms @ WEIGHT - unlike
    parts = {name: terms[:, i] for i, name in enumerate(FEATURES)} | {"unlike": unlike}
    return Scores(value, jnp.isfinite(value), parts)


def measure(images: Float[Array, "b 24 24 3"]) -> tuple[np.ndarray, np.ndarray]:
    """The constants MEAN and PRECISION from true renders. A twentieth of each variance is added to the
    covariance, so that features that move together do not make a wall of their difference."""
    values = np.asarray(features(images), np.float64)
    covariance = np.cov(values.T)
    covariance += np.diag(0.05 * np.diag(covariance) + 1e-5)
    return values.mean(0), np.linalg.inv(covariance)


def build(path: str | None = None, dtype: str = "float32") -> Reward:
    """The closed form as a reward; computes in float32 always."""
    without_weights("shapes_aesthetic", path)

    def score(
        params: PyTree, images: Float[Array, "b 24 24 3"], ctx: PyTree, t: Array | None = None
    ) -> Scores:
        check_size("shapes_aesthetic", images)
        return aesthetic(images)

    return Reward("shapes_aesthetic", {}, no_prompt, score, uses_prompt=False)
