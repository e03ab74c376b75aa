"""Scenes of the shapes world: drawn at random so that they satisfy a prompt, all inside a graph.

A picture is 24 x 24 pixels, cut in 3 x 3 cells of 8; every object lies inside a cell of its own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.worlds.shapes import grammar

SIZE = 24
CELL = 8
CELLS = SIZE // CELL
OBJECTS = 4
RADIUS = 3.4
RADIUS_SPREAD = 0.06
JITTER = 0.5
REACH = 3.7
"""Farthest that an object comes from the middle of its cell, which keeps neighbours 0.6 px apart."""
BRIGHTNESS = (0.9, 1.0)

NUM_TASKS, NUM_COLOURS, NUM_SHAPES = len(grammar.TASKS), len(grammar.COLOURS), len(grammar.SHAPES)
NUM_RELATIONS = len(grammar.RELATIONS)
POSITION = grammar.TASKS.index("position")
TWO_OBJECT = grammar.TASKS.index("two_object")
COUNTING = grammar.TASKS.index("counting")


class Scene(NamedTuple):
    """n pictures of up to four objects; only the first `count` of each row are there. Positions are
    (x, y) in pixels from the top left corner."""

    position: Float[Array, "n 4 2"]
    shape: Int[Array, "n 4"]
    colour: Int[Array, "n 4"]
    radius: Float[Array, "n 4"]
    count: Int[Array, " n"]
    brightness: Float[Array, "n 4"]


@functools.cache
def _prompt_table() -> np.ndarray:
    return grammar.encode([grammar.text(prompt) for prompt in grammar.all_prompts()])


def sample_prompts(key: Array, n: int, table: np.ndarray | None = None) -> Int[Array, "n 7"]:
    """n spec rows in equal task shares, uniform within a task; from the whole grammar or from the rows
    of `table` (for instance `grammar.encode(splits()["train"])`)."""
    rows = _prompt_table() if table is None else np.asarray(table, np.int32)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    tasks, first, size = np.unique(rows[:, 0], return_index=True, return_counts=True)
    task_key, row_key = jax.random.split(key)
    task = jax.random.randint(task_key, (n,), 0, len(tasks))
    chosen = jax.random.randint(row_key, (n,), 0, jnp.asarray(size)[task])
    return jnp.asarray(rows)[jnp.asarray(first)[task] + chosen]


@functools.cache
def _related_cells() -> np.ndarray:
    """Cell pairs for each relation, int[relation, 13, 2]: the offset along the relation's axis is the
    larger one, so that no picture satisfies two relations."""
    row, column = np.divmod(np.arange(CELLS**2), CELLS)
    dx, dy = column[None] - column[:, None], row[None] - row[:, None]
    holds = (dx > abs(dy), -dx > abs(dy), dy > abs(dx), -dy > abs(dx))
    return np.stack([np.argwhere(relation) for relation in holds])


def _cells(key: Array, spec: Int[Array, "n 7"]) -> Int[Array, "n 4"]:
    """Four different cells per row; the first two satisfy the relation where one is said."""
    n = spec.shape[0]
    free_key, pair_key = jax.random.split(key)
    order = jax.random.uniform(free_key, (n, CELLS**2))
    pairs = jnp.asarray(_related_cells())
    pair = pairs[jnp.maximum(spec[:, 6], 0), jax.random.randint(pair_key, (n,), 0, pairs.shape[1])]
    places = jnp.arange(CELLS**2)
    related = jnp.where(places == pair[:, :1], -2.0, jnp.where(places == pair[:, 1:], -1.0, order))
    return jnp.argsort(jnp.where(spec[:, 6:7] >= 0, related, order), axis=1)[:, :OBJECTS]


def _attribute(key: Array, first: Array, second: Array, pair: Array, bound: int) -> Int[Array, "n 4"]:
    """What is said of the objects, and a free draw where nothing is said."""
    said = jnp.where(pair[:, None] & (jnp.arange(OBJECTS) == 1), second[:, None], first[:, None])
    return jnp.where(said >= 0, said, jax.random.randint(key, said.shape, 0, bound))


def sample_scene(key: Array, spec: Int[Array, "n 7"]) -> Scene:
    """A random scene for each spec row that satisfies it and holds nothing else."""
    n = spec.shape[0]
    cell_key, jitter_key, shape_key, colour_key, radius_key, light_key = jax.random.split(key, 6)
    pair = spec[:, 5] >= 0
    radius = RADIUS * jax.random.uniform(
        radius_key, (n, OBJECTS), minval=1 - RADIUS_SPREAD, maxval=1 + RADIUS_SPREAD
    )
    jitter = jnp.minimum(JITTER, REACH - radius)[..., None]
    cells = _cells(cell_key, spec)
    centre = (jnp.stack([cells % CELLS, cells // CELLS], axis=-1) + 0.5) * CELL
    return Scene(
        position=centre + jitter * jax.random.uniform(jitter_key, (n, OBJECTS, 2), minval=-1.0, maxval=1.0),
        shape=_attribute(shape_key, spec[:, 3], spec[:, 5], pair, NUM_SHAPES),
        colour=_attribute(colour_key, spec[:, 2], spec[:, 4], pair, NUM_COLOURS),
        radius=radius,
        count=jnp.where(pair, 2, spec[:, 1]),
        brightness=jax.random.uniform(light_key, (n, OBJECTS), minval=BRIGHTNESS[0], maxval=BRIGHTNESS[1]),
    )


FRESH_SHARE = 0.3
"""Part of the corrupted captions that is replaced whole; in the others each attribute is redrawn with
chance 1/2. The mix makes a base model that draws cleanly and listens badly: head-room for RL."""


def corrupt(key: Array, spec: Int[Array, "n 7"], probability: float | Array) -> Int[Array, "n 7"]:
    """Caption noise: with the given probability a row no longer (fully) describes its picture."""
    fresh_key, redraw_key, choice_key = jax.random.split(key, 3)
    u = jax.random.uniform(choice_key, (spec.shape[0], 1))
    fresh = sample_prompts(fresh_key, spec.shape[0])
    noisy = jnp.where(u < FRESH_SHARE * probability, fresh, _redraw(redraw_key, spec))
    return jnp.where(u < probability, noisy, spec)


def _redraw(key: Array, spec: Int[Array, "n 7"]) -> Int[Array, "n 7"]:
    """Each attribute that the task says is redrawn with chance 1/2; the row stays in the grammar."""
    n = spec.shape[0]
    which_key, *keys = jax.random.split(key, 9)
    low = (0, 2, 0, 0, 0, 0, 0)
    high = (1, OBJECTS + 1, NUM_COLOURS, NUM_SHAPES, NUM_COLOURS, NUM_SHAPES, NUM_RELATIONS)
    draws = [jax.random.randint(k, (n,), a, b) for k, a, b in zip(keys[:7], low, high, strict=True)]
    said = (spec >= 0).at[:, 0].set(False).at[:, 1].set(spec[:, 0] == COUNTING)
    new = jnp.where(said & jax.random.bernoulli(which_key, 0.5, spec.shape), jnp.stack(draws, -1), spec)
    turn = jax.random.randint(keys[7], (n,), 1, NUM_COLOURS)
    same_colour = (new[:, 4] >= 0) & (new[:, 4] == new[:, 2])
    same_shape = (new[:, 0] == TWO_OBJECT) & (new[:, 5] == new[:, 3])
    new = new.at[:, 4].set(jnp.where(same_colour, (new[:, 4] + turn) % NUM_COLOURS, new[:, 4]))
    return new.at[:, 5].set(
        jnp.where(same_shape, (new[:, 5] + 1 + turn % (NUM_SHAPES - 1)) % NUM_SHAPES, new[:, 5])
    )
