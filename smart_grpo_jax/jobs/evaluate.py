"""Evaluate the bare policy: ODE, fixed noise per prompt and seed, so that any two policies compare in pairs.

`--config.eval.search=true` searches the noise at sampling time, too: what the search is worth without
any training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree, TrainState
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import assemble, host_scores, measured_window, traced
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.jobs.statistics import comparison, shown, signed
from smart_grpo_jax.maths import window
from smart_grpo_jax.policy import rollout
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.checkpoint import Checkpoints
from smart_grpo_jax.runtime.progress import Heartbeat, say, table
from smart_grpo_jax.worlds.shapes import grammar
from smart_grpo_jax.worlds.shapes.scenes import SIZE
from smart_grpo_jax.worlds.shapes.second_judge import second_judge

EVAL_SEED = 20_251_002
"""Evaluation noise is the same in every run, whatever its seed: any two runs can be compared in pairs."""


class Evaluation(NamedTuple):
    """Scores[prompt, seed] by name, the pictures of the first prompts, and which scores did not come."""

    prompts: list[str]
    scores: dict[str, np.ndarray]
    images: np.ndarray
    failed: tuple[str, ...] = ()

    def means(self) -> dict[str, float]:
        """Mean over prompts and seeds, per score."""
        return {name: _mean(values) for name, values in self.scores.items()}


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def program(run: Run, searched: bool, size: tuple[int, int] | None = None) -> Callable[..., rollout.Acted]:
    """The jitted rollout of an evaluation."""
    shape = eval_shape(run, searched)
    if size is not None:
        shape = dataclasses.replace(shape, latent=run.pipeline.latent_shape(size))
    return distributed.waits(jax.jit(partial(rollout.act, eval_functions(run), shape)))


def evaluator(
    run: Run,
    *,
    search: bool | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 0,
    act: Callable[..., rollout.Acted] | None = None,
) -> Callable[..., Evaluation]:
    """evaluate(weights, seed=EVAL_SEED) → Evaluation; the program is compiled on its first call.

    `batch` is the number of prompts in a call (0: as many as memory.rollout allows); `size` are the pixels
    of the pictures where they are not the run's; `act` is the `program` where it was made before.
    """
    config, members = run.config, run.config.eval.seeds
    searched = config.eval.search if search is None else search
    times = assemble.time_grid(config, run.pipeline, config.sampler.eval_steps, size)
    rows, _ = groups_per_call(run, len(run.eval_items), batch)
    draw = act or program(run, searched, size)

    def evaluate(trainable: PyTree, seed: int = EVAL_SEED) -> Evaluation:
        params = run.rollout_params(trainable) | {
            "reward": run.eval_reward.params,
            "search_reward": run.search_reward.params,
        }
        knobs = eval_knobs(config, times, searched, seed)
        scores: dict[str, list[np.ndarray]] = {}
        images: list[np.ndarray] = []
        outside = host_scores.Finished(run.eval_reward, config, "eval", members)
        for start in range(0, len(run.eval_items), rows):
            items = run.eval_items[start : start + rows]
            texts = [item.text for item in items]
            ids = [prompt_data.prompt_id(text) for text in texts]
            first = [item.repeat * members for item in items]
            one, _ = assemble.make_batch(run, texts, rows, run.eval_reward, ids, first)
            drawn = draw(params, knobs, one)
            outside.submit(drawn.images, texts, range(start, start + len(texts)))
            judged = distributed.whole(_scores(drawn)) | _second_opinion(config, texts, members, drawn.images)
            for name, value in judged.items():
                scores.setdefault(name, []).append(value[: len(texts) * members])
            if start < config.log.samples:
                images.append(distributed.whole(drawn.images[: len(texts) * members : members]))
        if scored := outside.gather():
            scores |= {part: [one.parts[part] for one in scored] for part in scored[0].parts}
            scores["reward"] = [a + b.value for a, b in zip(scores["reward"], scored, strict=True)]
        grid = {name: np.concatenate(v).reshape(-1, members) for name, v in scores.items()}
        shown = np.concatenate(images)[: config.log.samples]
        return Evaluation([item.text for item in run.eval_items], grid, shown, outside.failed)

    return evaluate


@jax.jit
def _scores(acted: rollout.Acted) -> dict[str, jax.Array]:
    return {"reward": jnp.where(acted.ok, acted.reward, jnp.nan), **acted.parts}


def _second_opinion(
    config: Config, texts: Sequence[str], members: int, images: jax.Array
) -> dict[str, np.ndarray]:
    """The held-out judge of the embedded world, in numpy, each process for its pictures; never trained on."""
    if not config.eval.source.startswith("shapes:") or images.shape[1:3] != (SIZE, SIZE):
        return {}
    try:
        spec = np.repeat(grammar.encode(list(texts)), members, axis=0)
    except UserError:  # a prompt of the user's own, outside the grammar
        return {}
    rows, own = distributed.own_rows(images)
    real = rows < len(spec)
    rows, own = rows[real], own[real]
    graded, strict = second_judge(own, spec[rows]) if len(rows) else (rows, rows)
    columns = {"second/graded": np.asarray(graded), "second/strict": np.asarray(strict)}
    return distributed.by_row(len(spec), rows, columns)


def groups_per_call(run: Run, count: int, batch: int = 0) -> tuple[int, int]:
    """(prompts in one call, calls) for `count` prompts: as many images as memory.rollout allows."""
    members = run.config.eval.seeds
    chunk = assemble.evaluated_at_once(run.config, members)
    return assemble.groups_per_call(run, count, members, batch or min(chunk, count))


def eval_shape(run: Run, searched: bool) -> rollout.Shape:
    """The rollout's shape with the evaluation's steps and seeds."""
    config = run.config
    return dataclasses.replace(
        run.shape,
        members=config.eval.seeds,
        steps=config.sampler.eval_steps,
        stop=config.sampler.eval_steps,
        searched_members=config.eval.seeds if searched else 0,
        one_step_rewards=False,
        same_latent=False,
    )


def eval_functions(run: Run) -> rollout.Functions:
    """The run's functions with the evaluation's guidance and rewards."""
    guided = run.pipeline.guided(run.velocity, run.config.sampler.eval_guidance)
    return dataclasses.replace(run.fns, velocity=guided, score=run.eval_reward.score)


def eval_knobs(config: Config, times: np.ndarray, searched: bool, seed: int) -> rollout.Knobs:
    """ODE everywhere; with the search on, noise at the searched steps alone."""
    steps = config.sampler.eval_steps
    mask = np.zeros(steps, bool)
    if searched:
        mask = window.step_mask(config.search.steps, steps, times)
    settings = dataclasses.replace(traced.search_settings(config), keep_candidates=False)
    return rollout.Knobs(
        seed=jnp.uint32(seed),
        epoch=jnp.int32(0),
        times=jnp.asarray(times),
        noise_level=jnp.float32(config.sampler.noise_level if searched else 0.0),
        stochastic=jnp.asarray(mask),
        searched=jnp.asarray(mask),
        execute_search=jnp.asarray(True),
        search=settings,
    )


def refuse_failures(config: Config, result: Evaluation, what: str) -> None:
    """Say which scores did not come; RewardError where they are too many."""
    missing = ~np.isfinite(result.scores["reward"])
    if warning := host_scores.tolerated(config, float(missing.mean()), what, result.failed):
        say(warning)


def print_comparison(rows: Sequence[Mapping[str, float | str]], count: int, labels: tuple[str, str]) -> None:
    """The table that ends a run."""
    cells = [
        [
            str(r["score"]),
            shown(float(r["base"])),
            shown(float(r["tuned"])),
            signed(float(r["difference"]), float(r["half_width"])),
        ]
        for r in rows
    ]
    say(table(cells, ["score", *labels, f"paired difference, 95 % ({count} held-out prompts)"]))


def evaluated_weights(config: Config, state: TrainState) -> PyTree:
    """EMA or raw weights, as the config says."""
    return state.ema if config.eval.weights == "ema" else state.params


def job(config: Config, workdir: str, epoch: int | None = None) -> None:
    """`--mode=eval`: the newest checkpoint of a run folder against the base on equal noise; without a
    checkpoint, the base alone (and, with eval.search, the base with the noise searched)."""
    config = measured_window.asked(config, workdir)
    run = assemble.assemble(config, training=False)
    distributed.meet(run.mesh)
    state = run.state()
    with Checkpoints(workdir, keep=1, best_of=None, say=say, read_only=True) as checkpoints:
        restored = checkpoints.restore(state, epoch=epoch)
    with Heartbeat("evaluating"):
        base = evaluator(run, search=False)(run.state().params)
    refuse_failures(config, base, "the base's evaluation")
    labels = ("base", "base, searched noise" if config.eval.search else "base")
    other = base
    if restored is not None:
        labels = ("base", f"epoch {restored.epoch}" + (", searched noise" if config.eval.search else ""))
    if restored is not None or config.eval.search:
        weights = evaluated_weights(config, restored.state if restored is not None else state)
        with Heartbeat("evaluating"):
            other = evaluator(run)(weights)
        refuse_failures(config, other, "the evaluation")
    print_comparison(comparison(base.scores, other.scores, base.prompts), len(base.prompts), labels)
