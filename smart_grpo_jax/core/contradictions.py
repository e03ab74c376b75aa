"""Contradictions between fields: one row per rule, (is it broken?, the line that says so)."""

from __future__ import annotations

import math
import re
from typing import Any

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.schema import weight_of


def elite_count(search: Any) -> int:
    """T = floor(P K), the candidates kept in a round."""
    return math.floor(search.elite * search.candidates + 1e-9)


def _window_end(c: Any) -> int:
    return c.sampler.window.start + c.sampler.window.size


def _bad_steps(c: Any) -> bool:
    if isinstance(c.search.steps, str):
        times = re.fullmatch(r"(0?\.?\d+)\.\.([01]?\.?\d+)", c.search.steps)
        named = c.search.steps in ("late", "early", "all", "none", "auto")
        return not named and not (times and 0 <= float(times[1]) < float(times[2]) <= 1)
    return any(not 0 <= s < c.sampler.steps for s in c.search.steps) or len(set(c.search.steps)) < len(
        c.search.steps
    )


def _searched(c: Any) -> bool:
    return c.search.rounds > 0 and c.search.steps != "none" and c.search.members > 0


def searched_members(c: Any) -> int:
    """How many members of each group are searched."""
    return round(c.search.members * c.prompts.members)


def _weightless(rewards: Any) -> bool:
    return all(weight_of(v) == 0 for v in rewards.values())


LIKELIHOOD = ("ppo", "guard")
"""Losses that need the density of each trained transition; the others learn from finished images alone."""

MOVING = ("random", "sliding")
"""Windows whose steps change from epoch to epoch."""

RULES: tuple[tuple[Any, str], ...] = (
    (
        lambda c: len(c.pretrain.flow_steps) != len(c.pretrain.caption_noise),
        "pretrain.flow_steps: got {c.pretrain.flow_steps}, wanted one number per pretrain.caption_noise",
    ),
    (
        lambda c: c.search.rounds > 0 and elite_count(c.search) < 1,
        "search.elite: got {c.search.elite:g}, wanted elite × candidates ≥ 1 (K = {c.search.candidates})",
    ),
    (
        lambda c: c.search.rounds > 1 and elite_count(c.search) == 1 and c.search.sigma_floor == 0,
        "search.elite: got {c.search.elite:g}: one elite has no spread; wanted elite × candidates ≥ 2, "
        "rounds = 1 or sigma_floor > 0",
    ),
    (
        _bad_steps,
        "search.steps: got {c.search.steps!r}, wanted late, early, all, none, auto, times such as 0.55..0.9 "
        "or distinct indices below sampler.steps = {c.sampler.steps}",
    ),
    (
        lambda c: (
            c.search.credit == "split" and _searched(c) and searched_members(c) in (0, c.prompts.members)
        ),
        "search.members: got {c.search.members:g} of {c.prompts.members} members, wanted some searched and "
        "some not with search.credit = split",
    ),
    (
        lambda c: _searched(c) and searched_members(c) == 0,
        "search.members: got {c.search.members:g} of {c.prompts.members} members, wanted at least one member "
        "(or search.rounds = 0)",
    ),
    (
        lambda c: _searched(c) and c.sampler.transition == "ode",
        "sampler.transition: got ode, which has no noise to search; wanted flow, dance or cps, or "
        "search.rounds = 0",
    ),
    (
        lambda c: _searched(c) and c.sampler.noise_level == 0,
        "sampler.noise_level: got 0, which leaves no noise to search; wanted > 0, or search.rounds = 0",
    ),
    (
        lambda c: c.search.execute == "random" and c.search.credit in ("offset", "split") and _searched(c),
        "search.execute: got random, wanted search with search.credit = {c.search.credit}",
    ),
    (
        lambda c: c.train.loss == "guard" and c.train.log_prob != "gaussian",
        "train.log_prob: got {c.train.log_prob}, wanted gaussian with train.loss = guard",
    ),
    (
        lambda c: c.train.loss not in LIKELIHOOD and c.train.log_prob != "gaussian",
        "train.log_prob: got {c.train.log_prob}, wanted gaussian with train.loss = {c.train.loss}, which "
        "has no density",
    ),
    (
        lambda c: c.train.loss not in LIKELIHOOD and c.train.step_weight != "uniform",
        "train.step_weight: got {c.train.step_weight}, wanted uniform with train.loss = {c.train.loss}, "
        "which draws its own times",
    ),
    (
        lambda c: c.train.actor == "ema" and c.train.loss in LIKELIHOOD,
        "train.actor: got ema, wanted raw with train.loss = {c.train.loss}, whose ratio begins at 1",
    ),
    (
        lambda c: c.search.credit == "local" and _searched(c) and c.sampler.window.kind in MOVING,
        "sampler.window.kind: got {c.sampler.window.kind}, wanted all, fraction or fixed with "
        "search.credit = local",
    ),
    (
        lambda c: c.search.credit != "none" and c.train.adv_combine == "normalise",
        "train.adv_combine: got normalise, wanted sum with search.credit = {c.search.credit}",
    ),
    (
        lambda c: c.eval.search and not _searched(c),
        "eval.search: got true, wanted false where nothing is searched (search.rounds = {c.search.rounds}, "
        "search.steps = {c.search.steps})",
    ),
    (
        lambda c: (
            c.eval.search
            and not isinstance(c.search.steps, str)
            and any(s >= c.sampler.eval_steps for s in c.search.steps)
        ),
        "search.steps: got {c.search.steps!r}, wanted indices below sampler.eval_steps = "
        "{c.sampler.eval_steps} with eval.search",
    ),
    (
        lambda c: c.search.credit == "local" and (c.search.rounds < 1 or c.search.candidates < 2),
        "search.candidates: got {c.search.candidates} in {c.search.rounds} rounds, wanted ≥ 2 in ≥ 1 with "
        "search.credit = local",
    ),
    (
        lambda c: c.search.credit == "local" and c.search.until > 0,
        "search.until: got {c.search.until}, wanted 0 with search.credit = local, which learns from "
        "the search alone",
    ),
    (
        lambda c: c.search.credit == "local" and c.search.members < 1,
        "search.members: got {c.search.members:g}, wanted 1 with search.credit = local",
    ),
    (
        lambda c: c.search.credit == "local" and c.search.space == "latent",
        "search.space: got latent, wanted transition with search.credit = local",
    ),
    (
        lambda c: c.search.credit != "none" and c.train.loss not in LIKELIHOOD,
        "search.credit: got {c.search.credit}, wanted none with train.loss = {c.train.loss}",
    ),
    (
        lambda c: c.train.loss in LIKELIHOOD and c.sampler.transition == "ode",
        "sampler.transition: got ode, wanted flow, dance or cps with train.loss = {c.train.loss}",
    ),
    (
        lambda c: c.train.loss in LIKELIHOOD and c.sampler.noise_level == 0 and c.train.epochs > 0,
        "sampler.noise_level: got 0, wanted > 0 with train.loss = {c.train.loss}",
    ),
    (
        lambda c: c.sampler.transition == "cps" and c.sampler.noise_level > 1,
        "sampler.noise_level: got {c.sampler.noise_level:g}, wanted ≤ 1 with sampler.transition = cps",
    ),
    (
        lambda c: c.sampler.window.kind == "fixed" and _window_end(c) > c.sampler.steps,
        "sampler.window.size: got start {c.sampler.window.start} + size {c.sampler.window.size}, wanted ≤ "
        "sampler.steps = {c.sampler.steps}",
    ),
    (
        lambda c: (
            c.sampler.window.kind in MOVING
            and c.sampler.window.stop == 0
            and _window_end(c) > c.sampler.steps - 1
        ),
        "sampler.window.size: got start {c.sampler.window.start} + size {c.sampler.window.size}, wanted ≤ "
        "sampler.steps - 1 = {c.sampler.steps} - 1",
    ),
    (
        lambda c: (
            c.sampler.window.kind == "sliding" and (c.sampler.window.start, c.sampler.window.stop) != (0, 0)
        ),
        "sampler.window.start: got {c.sampler.window.start} to {c.sampler.window.stop}, wanted 0 to 0 with "
        "sampler.window.kind = sliding",
    ),
    (
        lambda c: c.sampler.window.stop > c.sampler.steps,
        "sampler.window.stop: got {c.sampler.window.stop}, wanted ≤ sampler.steps = {c.sampler.steps}",
    ),
    (
        lambda c: 0 < c.sampler.window.stop < _window_end(c) and c.sampler.window.kind in MOVING,
        "sampler.window.stop: got {c.sampler.window.stop}, wanted ≥ start + size",
    ),
    (
        lambda c: (c.prompts.groups * c.prompts.members) % c.train.updates_per_epoch != 0,
        "train.updates_per_epoch: got {c.train.updates_per_epoch}, wanted a divisor of groups × members = "
        "{c.prompts.groups} × {c.prompts.members}",
    ),
    (
        lambda c: c.memory.rollout > 0 and c.prompts.groups % c.memory.rollout != 0,
        "memory.rollout: got {c.memory.rollout}, wanted a divisor of prompts.groups = {c.prompts.groups}",
    ),
    (
        lambda c: c.adapter.init and c.adapter.kind == "full",
        "adapter.init: got {c.adapter.init}, wanted none with adapter.kind = full",
    ),
    (
        lambda c: _weightless(c.rewards),
        "rewards: got no reward with a weight, wanted at least one",
    ),
    (
        lambda c: c.search_reward and _weightless(c.search_reward),
        "search_reward: got no reward with a weight, wanted at least one, or an empty table",
    ),
    (
        lambda c: c.model.path == "shapes" and c.model.resolution not in (0, 24),
        "model.resolution: got {c.model.resolution}, wanted 24 (or 0) with model.path = shapes",
    ),
)


def check(config: Any) -> None:
    """Raise the first contradiction as a UserError."""
    for broken, message in RULES:
        if broken(config):
            raise UserError(message.format(c=config))
