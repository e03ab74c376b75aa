"""One batch of random scenes and one compiled judge for all tests of the world."""

import jax
import numpy as np
import pytest

from smart_grpo_jax.worlds.shapes import judge as first
from smart_grpo_jax.worlds.shapes import render as painter
from smart_grpo_jax.worlds.shapes import scenes

N = 240


@pytest.fixture(scope="session")
def spec():
    return np.asarray(jax.jit(scenes.sample_prompts, static_argnums=1)(jax.random.key(11), N))


@pytest.fixture(scope="session")
def scene(spec):
    drawn = jax.jit(scenes.sample_scene)(jax.random.key(12), spec)
    return scenes.Scene(*(np.asarray(field) for field in drawn))


@pytest.fixture(scope="session")
def render():
    paint = jax.jit(painter.render)
    return lambda scene: np.asarray(paint(scene))


@pytest.fixture(scope="session")
def images(scene, render):
    return render(scene)


@pytest.fixture(scope="session")
def judge():
    compiled = jax.jit(first.judge)

    def call(images, spec, t=None):
        verdict = compiled(images, spec) if t is None else compiled(images, spec, t)
        return np.asarray(verdict.graded), np.asarray(verdict.strict)

    return call


@pytest.fixture(scope="session")
def clean(judge, images, spec):
    return judge(images, spec)
