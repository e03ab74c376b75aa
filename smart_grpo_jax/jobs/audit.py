"""`--mode=rewards --audit`: at which steps the reward judges well, and at which the search can win anything.

*Fidelity* of a step: does the reward of its one-step decode order the images of a prompt as the finished
images will be ordered? *Leverage*: how far apart are the candidates of one state, and what does a finished
image gain when this step alone is searched? docs/audit.md tells how to read both.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.contradictions import MOVING, elite_count
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, ScoreFn, Scores
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import assemble, audit_picture, audit_report, check, statistics, traced
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.jobs.audit_numbers import Interval, Step, bootstrap, fidelity, recommend, spread
from smart_grpo_jax.jobs.audit_report import Audit
from smart_grpo_jax.policy import cost, rollout
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.checkpoint import Checkpoints
from smart_grpo_jax.runtime.files import storage, write_atomic, write_json
from smart_grpo_jax.runtime.progress import Heartbeat, duration, say

NOTHING = Interval(float("nan"), float("nan"), float("nan"))


class Drawn(NamedTuple):
    """Rollouts of all calls: scores of finished images and of one-step decodes by name (the columns), and
    the rewards of the candidates that the first round of the search looked at."""

    final: Float[np.ndarray, "p m c"]
    early: Float[np.ndarray, "t+1 p m c"] | None
    tried: Float[np.ndarray, "t p m k"] | None
    seconds: float


def job(config: Config, workdir: str) -> None:
    """Measure the newest checkpoint of the run folder, or the base; print the table, write audit.json and
    audit.svg."""
    config = searching(config)
    check.check_hosts(config)
    with Heartbeat("loading"):
        run = assemble.assemble(config, items(config), training=False)
        state = run.state()
        # training rolls out the raw weights, so theirs is the search that is measured
        with Checkpoints(workdir, keep=1, best_of=None, say=say, read_only=True) as checkpoints:
            restored = checkpoints.restore(state)
    every = np.ones(config.sampler.steps, bool)
    every[-1] = config.sampler.window.noise_last
    weights = f"epoch {restored.epoch}" if restored else "base"
    found = measure(run, (restored.state if restored else state).params, every, weights)
    say(audit_report.text(found))
    if distributed.is_main():
        say(f"written: {store(found, Path(workdir))} and audit.svg")


def store(found: Audit, workdir: Path) -> Path:
    """audit.json and audit.svg in the run folder, each whole or not there."""
    with storage(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    write_atomic(workdir / "audit.svg", audit_picture.svg(found))
    write_json(workdir / "audit.json", audit_report.to_json(found))
    return workdir / "audit.json"


def searching(config: Config) -> Config:
    """The config with a search that is taken by all members: `rounds = 0` (Flow-GRPO) asks about the
    published one."""
    if config.sampler.transition == "ode" or config.sampler.noise_level == 0:
        raise UserError(
            "audit: this sampler has no noise to search, wanted sampler.transition and noise_level"
        )
    rounds = config.search.rounds or (traced.DEFAULT_ROUNDS if elite_count(config.search) > 1 else 1)
    search = dataclasses.replace(
        config.search, rounds=rounds, steps="all", members=1.0, credit="none", execute="search"
    )
    return dataclasses.replace(config, search=search)


def items(config: Config) -> list[prompt_data.Item]:
    """The training prompts that are looked at: the same ones in every audit of a set."""
    return prompt_data.evaluation_items(prompt_data.load(config.prompts.source), config.audit.prompts)


def noisy(config: Config) -> Bool[np.ndarray, " steps"]:
    """The steps at which the sampler has noise in some epoch: what can be searched in training."""
    w, steps = config.sampler.window, config.sampler.steps
    if w.kind not in MOVING:
        return np.asarray(traced.epoch_window(config, 0).stochastic)
    end = w.stop if w.kind == "random" and w.stop else steps - 1
    return (np.arange(steps) >= w.start) & (np.arange(steps) < end)


def measure(run: Run, trainable: PyTree, tried: Bool[np.ndarray, " steps"], weights: str) -> Audit:
    """Roll out the run's evaluation prompts: once as they are, then with each step of `tried` searched
    alone, against the same noise unsearched. The run's config must search (`searching`)."""
    names, fns = columns(run)
    draw = Draw(run, fns, trainable)
    texts = [item.text for item in run.eval_items]
    plain = draw(rollout_knobs(run), one_step=True)
    assert plain.early is not None
    kept = distinct(plain.final)
    faithful = {c: [fidelity(row[..., c], plain.final[..., c], texts) for row in plain.early] for c in kept}
    group_std = spread(plain.final[..., 0])
    progress = Progress(int(tried.sum()), draw, audit_report.digits(group_std))
    # in "transition" space a candidate is decoded where the step arrives, else where it begins
    after = int(run.config.search.space == "transition")
    can, steps = noisy(run.config), []
    for j in range(run.config.sampler.steps):
        alone = search_alone(run, draw, j, kept) if tried[j] else Alone([NOTHING] * len(kept))
        if tried[j]:
            progress.step(j, float(run.times[j]), alone.gains[0])
        step = Step(
            step=j,
            t=float(run.times[j]),
            t_next=float(run.times[j + 1]),
            noisy=bool(can[j]),
            fidelity=faithful[0][j],
            judged=faithful[0][j + after],
            spread=alone.spread,
            share=alone.spread / group_std if group_std > 0 else float("nan"),
            gain=alone.gains[0],
            seconds=alone.seconds,
            nfe=alone.nfe,
            parts={names[c]: (faithful[c][j], gain) for c, gain in zip(kept, alone.gains, strict=True) if c},
        )
        steps.append(step)
    return Audit(
        holds_for=audit_report.identity(run.config),
        weights=weights,
        seed=run.config.seed,
        prompts=len(texts),
        members=run.config.audit.members,
        finished=statistics.mean(plain.final[..., 0]),
        group_std=group_std,
        steps=tuple(steps),
        recommended=recommend(steps, tried, run.config.audit.window),
        usable=recommend(steps, tried & can, run.config.audit.window),
        nfe=draw.spent,
        seconds=draw.seconds,
        compile_seconds=draw.compile_seconds,
    )


class Alone(NamedTuple):
    """What the search of one step alone does: the gain of each score, the spread of the candidates."""

    gains: list[Interval]
    spread: float = float("nan")
    seconds: float = 0.0
    nfe: int = 0


def search_alone(run: Run, draw: Draw, j: int, kept: Sequence[int]) -> Alone:
    """Search step j, and compare in pairs with the same noise unsearched."""
    knobs = rollout_knobs(run, j)
    base, found = draw.unsearched(knobs), draw(knobs)
    assert found.tried is not None
    difference = found.final - base.final
    texts = [item.text for item in run.eval_items]
    gains = [bootstrap(statistics.per_prompt_mean(difference[..., c]), texts) for c in kept]
    calls = draw.price(1)["velocity"] // draw.images
    return Alone(gains, spread(found.tried[j]), found.seconds, calls)


def columns(run: Run) -> tuple[list[str], rollout.Functions]:
    """The search's reward with its summands beside it, as one score with a column for each: one decode
    serves them all. Both the one-step decode and the finished image are judged by it."""
    reward = run.search_reward
    height, width, _ = run.shape.latent
    factor = run.pipeline.vae.factor
    image = jax.ShapeDtypeStruct((1, height * factor, width * factor, 3), jnp.float32)
    one = reward.prepare([run.eval_items[0].text])
    parts = sorted(jax.eval_shape(reward.score, reward.params, image, one).parts)

    def score(params: PyTree, images: Array, ctx: PyTree, t: Array | None = None) -> Scores:
        scores = reward.score(params, images, ctx, t)
        value = jnp.where(scores.ok, scores.value, jnp.nan)
        table = jnp.stack([value, *(scores.parts[name].astype(jnp.float32) for name in parts)], axis=-1)
        return Scores(table, jnp.ones((len(table), 1), bool), {})

    wide: ScoreFn = score
    return ["reward", *parts], dataclasses.replace(run.fns, score=wide)


def distinct(final: Float[np.ndarray, "p m c"]) -> list[int]:
    """The columns that do not repeat an earlier one: a mixture of one reward is that reward."""
    kept: list[int] = []
    for c in range(final.shape[-1]):
        if not any(np.array_equal(final[..., c], final[..., k], equal_nan=True) for k in kept):
            kept.append(c)
    return kept


def rollout_knobs(run: Run, searched: int | None = None) -> rollout.Knobs:
    """The first epoch's rollout; with `searched`, that step is noisy and searched."""
    knobs = traced.rollout_knobs(run.config, run.times, 0)
    alone = np.arange(run.config.sampler.steps) == (-1 if searched is None else searched)
    return knobs._replace(
        stochastic=jnp.asarray(np.asarray(knobs.stochastic) | alone), searched=jnp.asarray(alone)
    )


class Draw:
    """draw(knobs) → Drawn over all prompts; one program for every searched step, and one for fidelity."""

    def __init__(self, run: Run, fns: rollout.Functions, trainable: PyTree) -> None:
        config, members = run.config, run.config.audit.members
        self._run, self._fns = run, fns
        self._shape = dataclasses.replace(
            run.shape, members=members, stop=run.shape.steps, searched_members=members, one_step_rewards=False
        )
        self._plain = dataclasses.replace(self._shape, searched_members=0, one_step_rewards=True)
        self._params = run.rollout_params(trainable) | {"reward": run.search_reward.params}
        chunk = assemble.evaluated_at_once(config, members)
        self._rows, self._calls = assemble.groups_per_call(run, len(run.eval_items), members, chunk)
        self._programs: dict[bool, Any] = {}
        self._bases: dict[bytes, Drawn] = {}
        self.images = len(run.eval_items) * members
        self.spent = dict(cost.NOTHING)
        self.seconds = self.compile_seconds = 0.0

    def __call__(self, knobs: rollout.Knobs, one_step: bool = False) -> Drawn:
        """All prompts, a few at a time where memory asks for it."""
        started = time.monotonic()
        compiled = self.compile_seconds
        parts = [self._call(knobs, one_step, call * self._rows) for call in range(self._calls)]
        seconds = time.monotonic() - started - (self.compile_seconds - compiled)
        self.seconds += seconds
        searched = int(np.asarray(knobs.searched).sum())
        self.spent = cost.add(self.spent, self.price(searched, one_step))
        final, early, tried = zip(*parts, strict=True)
        return Drawn(np.concatenate(final), _joined(early), _joined(tried), seconds)

    def unsearched(self, knobs: rollout.Knobs) -> Drawn:
        """The same noise at the same steps without a search; drawn once for each choice of noisy steps."""
        noisy_steps = np.asarray(knobs.stochastic).tobytes()
        if noisy_steps not in self._bases:
            self._bases[noisy_steps] = self(knobs._replace(searched=jnp.zeros_like(knobs.searched)))
        return self._bases[noisy_steps]

    def price(self, searched: int, one_step: bool = False) -> dict[str, int]:
        """Calls of the network, the decoder and the reward in one pass over the prompts."""
        shape = self._plain if one_step else self._shape
        run = self._run
        return cost.sampling(shape, run.config, len(run.eval_items), searched, run.pipeline.calls)

    def _call(
        self, knobs: rollout.Knobs, one_step: bool, start: int
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        run, members = self._run, self._shape.members
        some = run.eval_items[start : start + self._rows]
        texts = [item.text for item in some]
        ids = [prompt_data.prompt_id(text) for text in texts]
        first = [item.repeat * members for item in some]
        batch, _ = assemble.make_batch(run, texts, self._rows, run.search_reward, ids, first)
        acted = distributed.whole(self._program(one_step, knobs, batch)(self._params, knobs, batch))
        grid = lambda a: a[: len(some) * members].reshape(len(some), members, -1)
        each = lambda a: np.stack([grid(row) for row in a])
        early = each(acted.one_step) if acted.one_step is not None else None
        tried = each(acted.found.rewards[:, :, 0]) if acted.found is not None else None
        return grid(acted.reward), early, tried

    def _program(self, one_step: bool, knobs: rollout.Knobs, batch: rollout.Batch) -> Any:
        """Compiled ahead, so that compile time and run time are told apart."""
        if one_step not in self._programs:
            started = time.monotonic()
            act = partial(_outputs, self._fns, self._plain if one_step else self._shape)
            with Heartbeat("audit: compiling"):
                self._programs[one_step] = jax.jit(act).lower(self._params, knobs, batch).compile()
            self.compile_seconds += time.monotonic() - started
        return self._programs[one_step]


def _joined(parts: tuple[np.ndarray | None, ...]) -> np.ndarray | None:
    """The prompts of several calls, along the second axis."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known, 1) if known else None


class Outputs(NamedTuple):
    """What leaves the device: no pictures, no paths."""

    reward: Array
    one_step: Array | None
    found: rollout.Found | None


def _outputs(
    fns: rollout.Functions, shape: rollout.Shape, params: PyTree, knobs: rollout.Knobs, batch: rollout.Batch
) -> Outputs:
    acted = rollout.act(fns, shape, params, knobs, batch)
    return Outputs(acted.reward, acted.one_step, acted.found)


class Progress:
    """A line for each step, with the time that is left."""

    def __init__(self, total: int, draw: Draw, digits: int) -> None:
        self._total, self._draw, self._digits = total, draw, digits
        self._done = 0
        self._start = draw.seconds

    def step(self, j: int, t: float, gain: Interval) -> None:
        """Step j is done."""
        self._done += 1
        left = (self._draw.seconds - self._start) / self._done * (self._total - self._done)
        rest = f", {duration(left)} left" if self._done < self._total else ""
        say(
            f"audit {self._done}/{self._total}: step {j} (t = {t:.2f}) gains {gain.words(self._digits)}{rest}"
        )
