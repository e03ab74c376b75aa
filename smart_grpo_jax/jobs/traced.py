"""The traced arguments of the programs, epoch by epoch: what may change without a recompilation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.config import Config, searched_steps
from smart_grpo_jax.core.contradictions import elite_count
from smart_grpo_jax.maths import search, transition, weights, window
from smart_grpo_jax.policy import credit, rollout, update

PUBLISHED_CLIPS = {"ppo": 1e-4, "guard": 2e-6, "awm": 1.0, "nft": 1.0}
"""Ratio clips where `train.clip` is 0; NFT has no ratio."""

DEFAULT_ROUNDS = 5
"""Rounds that the program is compiled for when `search.rounds` is 0 and the search is never taken."""


def search_mask(config: Config, times: np.ndarray, stochastic: np.ndarray, epoch: int = 0) -> np.ndarray:
    """Which steps are searched: only noisy ones can be, and none once the search has had its epochs."""
    steps = config.sampler.steps
    if not searched_steps(config) or 0 < config.search.until <= epoch:
        return np.zeros(steps, bool)
    return window.step_mask(config.search.steps, steps, times, stochastic=stochastic)


def epoch_window(config: Config, epoch: int) -> window.Window:
    """Noisy and trained steps of an epoch."""
    w = config.sampler.window
    high = {"high": w.stop or None}
    options: Mapping[str, dict[str, Any]] = {
        "all": {"noise_last": w.noise_last},
        "fraction": {"fraction": w.fraction, "noise_last": w.noise_last},
        "fixed": {"start": w.start, "size": w.size},
        "random": {"size": w.size, "low": w.start, **high},
        "sliding": {"size": w.size, "stride": w.stride, "every": w.every},
    }
    return window.window(w.kind, config.sampler.steps, epoch, config.seed, **options[w.kind])


def search_settings(config: Config) -> search.Settings:
    """The options of the search, static and traced."""
    s = config.search
    # A search that is never taken may have one elite; the floor is data and keeps the program the same.
    floor = s.sigma_floor if s.rounds else 1.0
    return search.settings(
        rounds=s.rounds or DEFAULT_ROUNDS,
        candidates=s.candidates,
        elite=s.elite if elite_count(s) else 1.0,
        returns=s.returns,
        select=s.select,
        noise_norm=s.noise_norm,
        sigma_floor=floor,
        smoothing=s.smoothing,
        antithetic=s.antithetic,
        keep_candidates=s.credit == "local" and searched_steps(config),
    )


def rollout_knobs(config: Config, times: np.ndarray, epoch: int) -> rollout.Knobs:
    """The traced part of a training rollout."""
    stochastic = epoch_window(config, epoch).stochastic
    level = 0.0 if config.sampler.transition == "ode" else config.sampler.noise_level
    return rollout.Knobs(
        seed=jnp.uint32(config.seed),
        epoch=jnp.int32(epoch),
        times=jnp.asarray(times),
        noise_level=jnp.float32(level),
        stochastic=jnp.asarray(stochastic),
        searched=jnp.asarray(search_mask(config, times, stochastic, epoch)),
        execute_search=jnp.asarray(config.search.execute == "search"),
        search=search_settings(config),
    )


def credit_masks(config: Config, times: np.ndarray, epoch: int, real: np.ndarray) -> credit.Masks:
    """Trained steps, searched steps and padding of an epoch."""
    w = epoch_window(config, epoch)
    searched = search_mask(config, times, w.stochastic, epoch)
    trained = (
        np.flatnonzero(searched) if config.search.credit == "local" and searched_steps(config) else w.trained
    )
    return credit.Masks(
        jnp.asarray(trained, jnp.int32),
        jnp.asarray(searched),
        jnp.float32(config.search.offset),
        jnp.asarray(real),
    )


def learning_rate(config: Config, epoch: int) -> float:
    """The rate of an epoch: η 2^(-epoch / half-life), which does not depend on how many epochs follow."""
    t = config.train
    return t.learning_rate * 0.5 ** (epoch / t.half_life) if t.half_life else t.learning_rate


def update_knobs(config: Config, times: np.ndarray, epoch: int) -> update.Knobs:
    """The traced part of an update."""
    t = config.train
    grid = jnp.asarray(times)
    blank = jnp.zeros((1, 1, 1, 1))
    level = jnp.float32(config.sampler.noise_level)
    std = [
        transition.step(config.sampler.transition, blank, blank, a, b, level, grid[1]).std.reshape(())
        for a, b in itertools.pairwise(grid)
    ]
    trained = jnp.asarray(epoch_window(config, epoch).trained)
    return update.Knobs(
        seed=jnp.uint32(config.seed),
        epoch=jnp.int32(epoch),
        times=grid,
        noise_level=level,
        step_weight=weights.step_weights(t.step_weight, jnp.stack(std), grid, trained),
        learning_rate=jnp.float32(learning_rate(config, epoch)),
        weight_decay=jnp.float32(t.weight_decay),
        warmup=jnp.float32(t.warmup),
        clip=jnp.float32(t.clip or PUBLISHED_CLIPS[t.loss]),
        kl_weight=jnp.float32(t.kl_weight),
        ema_decay=jnp.float32(t.ema.decay),
    )
