"""The exact judge of the shapes world as a reward: no weights, in the graph."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards.base import Reward, without_weights
from smart_grpo_jax.worlds.shapes import grammar
from smart_grpo_jax.worlds.shapes.judge import judge
from smart_grpo_jax.worlds.shapes.scenes import SIZE


def check_size(name: str, images: Array) -> None:
    """UserError for images that are not of the world's size: a resized object is another object."""
    if images.shape[1:] != (SIZE, SIZE, 3):
        height, width = images.shape[1:3]
        raise UserError(f"reward {name}: got images of {height}x{width}, want {SIZE}x{SIZE}")


def build(path: str | None = None, dtype: str = "float32", strict: bool = False) -> Reward:
    """Graded value in [0, 1], or with `strict` 0 or 1; both are parts. Computes in float32 always."""
    without_weights("shapes", path)

    def score(
        params: PyTree, images: Float[Array, "b 24 24 3"], ctx: Int[Array, "b 7"], t: Array | None = None
    ) -> Scores:
        check_size("shapes", images)
        verdict = judge(images, ctx, t)
        value = verdict.strict if strict else verdict.graded
        return Scores(
            value, jnp.isfinite(verdict.graded), {"graded": verdict.graded, "strict": verdict.strict}
        )

    return Reward("shapes", {}, grammar.encode, score, uses_prompt=True)
