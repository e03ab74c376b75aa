"""Train: Smart-GRPO and Flow-GRPO are this one loop.

The order of a round is fixed so that a kill at any moment costs nothing but time: the line of epoch n is
on disk before the checkpoint of n is begun, and what a line needs that was computed before a stop travels
in the checkpoint's meta data.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import resumable
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import PleaseRestart, StorageError
from smart_grpo_jax.core.types import TrainState
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import (
    assemble,
    evaluate,
    guards,
    host_scores,
    measured_window,
    record,
    reward_check,
    speed,
    speed_text,
    traced,
)
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.jobs.programs import Programs, programs_of
from smart_grpo_jax.policy import cost, credit, rollout, update
from smart_grpo_jax.runtime import distributed, manifest
from smart_grpo_jax.runtime.checkpoint import Checkpoints
from smart_grpo_jax.runtime.compile_cache import CompileCount
from smart_grpo_jax.runtime.metrics import MetricLog
from smart_grpo_jax.runtime.profile import Trace
from smart_grpo_jax.runtime.progress import Eta, Heartbeat, box, epoch_line, say
from smart_grpo_jax.runtime.run_folder import RunFolder
from smart_grpo_jax.runtime.signals import StopFlag
from smart_grpo_jax.runtime.watchdog import Watchdog


class Stopped(Exception):
    """A signal asked for the end; the state is saved."""


@dataclasses.dataclass
class Loop:
    """The mutable side of a run: where it stands, and what it writes to."""

    run: Run
    folder: RunFolder
    checkpoints: Checkpoints
    log: MetricLog
    stop: StopFlag
    watchdog: Watchdog
    state: TrainState
    epoch: int
    pending: dict[str, float]
    nfe: dict[str, int]
    eta: Eta
    compiles: CompileCount
    speed: speed.Speed
    logged: int
    evaluate: Callable[..., evaluate.Evaluation]
    rounds: int = 0
    failed: tuple[str, ...] = ()

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.run.config


def job(config: Config, workdir: str, command: Sequence[str], profile: int | None = None) -> None:
    """`--mode=train`: begin or take up the run in `workdir`, go on to the last epoch, write the report.
    `profile` is the epoch whose trace is kept (0: the third of this process; None: of none)."""
    log = config.log
    with (
        StopFlag() as stop,
        Watchdog(workdir, jax.process_index(), log.deadline, silence=log.silence, lag=log.lag) as watchdog,
        RunFolder.open(
            workdir, config=configs.to_dict(config), command=list(command), semantic=resumable.semantic
        ) as folder,
        Checkpoints(folder.path, keep=config.checkpoint.keep, best_of="eval/reward", say=say) as checkpoints,
    ):
        line = ""
        try:
            train(config, folder, checkpoints, stop, watchdog, profile)
        except Stopped as stopped:
            line = f"stopped by {stopped}; the same command goes on from there"
    if line and distributed.supervised():
        raise PleaseRestart(line)
    if line:
        say(line)


def train(
    config: Config,
    folder: RunFolder,
    checkpoints: Checkpoints,
    stop: StopFlag,
    watchdog: Watchdog,
    profile: int | None = None,
) -> None:
    """The recipe."""
    compiles = CompileCount()
    with watchdog.phase("load", 0, limited=False):
        config, spent = measured_window.settled(config, folder.path)
        with Heartbeat("loading"):
            run = assemble.assemble(config)
        distributed.meet(run.mesh)
        programs = programs_of(run)
        loop = begin(run, programs, folder, checkpoints, stop, watchdog, compiles, spent)
    trace = Trace(folder.path, profile, loop.epoch, config.train.epochs)
    with loop.log:
        while True:
            tell(loop)
            if finished(loop):
                break
            started, compiled = time.monotonic(), compiles.total
            with trace.of(loop.epoch + 1):
                acted, masks, batch = act(loop, programs)
                stop_here(loop)
                learn(loop, programs, acted, masks, batch)
            expect_no_compilation(loop, compiled)
            loop.eta.add(time.monotonic() - started)
            stop_here(loop)
        if not checkpoints.wait():
            raise StorageError(f"{checkpoints.path}: the last checkpoint could not be written")
    with watchdog.phase("report", loop.epoch, limited=False), Heartbeat("writing the report"):
        record.finish(run, folder, programs.act, loop.state, manifest.state_hash(loop.state))


def begin(
    run: Run,
    programs: Programs,
    folder: RunFolder,
    checkpoints: Checkpoints,
    stop: StopFlag,
    watchdog: Watchdog,
    compiles: CompileCount,
    spent: dict[str, int],
) -> Loop:
    """Fresh or restored; the box that says what this run is. `spent` was paid before the first epoch."""
    state = run.state()
    restored = checkpoints.restore(state)
    meta: dict[str, Any] = restored.meta if restored else {}
    state = restored.state if restored else state
    epoch = restored.epoch if restored else 0
    if restored is None and run.config.train.check_rewards:
        with Heartbeat("looking at the rewards"):
            reward_check.before_training(run.config, run.reward, run.search_reward, run.prompts.prompts)
    if restored and meta["prompts"] != run.prompts.sha:
        say(f"WARNING: {run.prompts.source} has changed since this run began; new prompts are drawn from it")
    log = MetricLog(
        folder.path,
        tensorboard=run.config.log.tensorboard,
        resume_epoch=epoch if restored else None,
        say=say,
    )
    eta = Eta(run.config.train.epochs, carried=meta.get("eta"))
    nfe = dict(meta.get("nfe", spent))
    say(box("smart_grpo_jax", record.summary(run, state, folder.path, epoch, restored is not None)))
    pending = dict(meta.get("pending", {}))
    timed = speed.Speed(run, state.params, programs.prices)
    lines = log.state_lines() if distributed.is_main() else []
    logged = distributed.from_main(lines[-1]["epoch"] if lines else -1)
    look = evaluate.evaluator(run, act=programs.evaluate)
    carried = (pending, nfe, eta, compiles, timed, logged, look)
    return Loop(run, folder, checkpoints, log, stop, watchdog, state, epoch, *carried)


def tell(loop: Loop) -> None:
    """The line of this epoch, with an evaluation when one is due; then the checkpoint when one is due."""
    if loop.logged < loop.epoch:
        scalars = loop.pending
        if evaluation_due(loop.config, loop.epoch):
            started = time.monotonic()
            heartbeat = Heartbeat(f"evaluating epoch {loop.epoch}")
            with loop.speed.phase("evaluate"), loop.watchdog.phase("evaluate", loop.epoch), heartbeat:
                weights = evaluate.evaluated_weights(loop.config, loop.state)
                result = loop.evaluate(weights)
            evaluate.refuse_failures(loop.config, result, f"evaluation {loop.epoch}")
            scalars |= record.evaluation(loop.folder, loop.epoch, result)
            scalars["wall/eval_seconds"] = time.monotonic() - started
        scalars |= {f"nfe/{name}": count for name, count in loop.nfe.items()}
        scalars["wall/train_seconds"] = loop.eta.seconds
        if loop.epoch % loop.config.log.every == 0 or "eval/reward" in scalars:
            scalars |= loop.speed.told()
            loop.log.write(loop.epoch, int(loop.state.step), scalars)
            loop.logged = loop.epoch
            say(
                epoch_line(
                    loop.epoch,
                    loop.config.train.epochs,
                    record.headline(scalars),
                    loop.eta.remaining(loop.epoch),
                )
            )
            if told := speed_text.line(scalars):
                say(told)
        loop.pending = scalars
    if loop.epoch % loop.config.checkpoint.every == 0 or loop.epoch >= loop.config.train.epochs:
        save(loop, logged=True)


def evaluation_due(config: Config, epoch: int) -> bool:
    """At the beginning, every `eval.every` epochs, and at the end."""
    every = config.eval.every
    return epoch in (0, config.train.epochs) or (every > 0 and epoch % every == 0)


def finished(loop: Loop) -> bool:
    """Whether the last epoch is done; a signal that came while it was told ends the run here."""
    if loop.epoch >= loop.config.train.epochs:
        return True
    stop_here(loop, logged=True)
    return False


def save(loop: Loop, logged: bool) -> None:
    """Begin a checkpoint, unless this epoch already has one."""
    if distributed.from_main(loop.epoch in loop.checkpoints.list_epochs()):
        return
    meta = {
        "prompts": loop.run.prompts.sha,
        "nfe": loop.nfe,
        "searched": loop.config.search.steps,
        "eta": loop.eta.state(),
        "pending": {} if logged else loop.pending,
    }
    with loop.speed.phase("save"), loop.watchdog.phase("save", loop.epoch):
        loop.checkpoints.save(loop.epoch, loop.state, meta, loop.pending.get("eval/reward"))


def stop_here(loop: Loop, logged: bool | None = None) -> None:
    """If a signal came: save the last finished epoch and leave."""
    asked = distributed.gather(loop.stop.requested)
    rank = next((rank for rank, name in enumerate(asked) if name is not None), None)
    if rank is None:
        return
    if logged is None:
        logged = loop.logged >= loop.epoch
    loop.checkpoints.wait()
    save(loop, logged)
    loop.checkpoints.wait()
    where = f" (process {rank})" if len(asked) > 1 else ""
    raise Stopped(f"{asked[rank]}{where} after epoch {loop.epoch}")


def act(loop: Loop, programs: Programs) -> tuple[rollout.Acted, credit.Masks, rollout.Batch]:
    """Roll out the groups of this epoch, a few at a time where memory asks for it."""
    run, config = loop.run, loop.config
    index = prompt_data.epoch_groups(len(run.prompts.prompts), config.prompts.groups, config.seed, loop.epoch)
    texts = [run.prompts.prompts[i] for i in index]
    members = config.prompts.members
    size, calls = assemble.training_calls(config, run.mesh)
    knobs = traced.rollout_knobs(run.config, run.times, loop.epoch)
    params = run.rollout_params(update.actor(run.recipe, loop.state))
    outside = host_scores.Finished(run.reward, config, f"e{loop.epoch + 1}", members)
    parts, batches, real = [], [], []
    heartbeat = Heartbeat(f"rolling out epoch {loop.epoch + 1}")
    with loop.speed.phase("rollout"), loop.watchdog.phase("rollout", loop.epoch), heartbeat:
        for call in range(calls):
            some = slice(call * size, (call + 1) * size)
            places = range(len(texts))[some]
            batch, here = assemble.make_batch(run, texts[some], size, run.reward, places)
            parts.append(programs.act(params, knobs, batch))
            batches.append(batch)
            real.append(here)
            outside.submit(parts[-1].images, texts[some], index[some].tolist())
        scored = outside.gather()
        loop.speed.add("host rewards", outside.waited)
        if scored:
            parts = [host_scores.added(part, scores) for part, scores in zip(parts, scored, strict=True)]
        loop.failed = outside.failed
        acted, batch = programs.join(parts), record.join_batches(batches)
        jax.block_until_ready(acted.reward)
    masks = traced.credit_masks(run.config, run.times, loop.epoch, np.concatenate(real))
    return acted, masks, batch


def learn(
    loop: Loop, programs: Programs, acted: rollout.Acted, masks: credit.Masks, batch: rollout.Batch
) -> None:
    """Credit, update, and the guards: no reward, a ratio that is not 1, numbers that are not numbers."""
    run, allowed = loop.run, None
    if loop.rounds == 0:
        allowed = guards.tolerance(run.config, run.times, np.asarray(masks.trained))
    summary = {k: float(v) for k, v in distributed.whole(programs.summary(acted, masks)).items()}
    what = f"epoch {loop.epoch + 1}"
    if warning := host_scores.tolerated(loop.config, summary["train/failed"], what, loop.failed):
        say(warning)
    heartbeat = Heartbeat(f"updating epoch {loop.epoch + 1}")
    with loop.speed.phase("update"), loop.watchdog.phase("update", loop.epoch), heartbeat:
        experience = programs.credit(acted, masks)
        knobs = traced.update_knobs(loop.config, loop.run.times, loop.epoch)
        state, metrics = programs.learn(loop.state, loop.run.frozen, batch.cond, experience, knobs)
        metrics = distributed.whole(metrics)
    loop.state, loop.epoch = state, loop.epoch + 1
    guards.check(run.config, state, metrics, allowed)
    spent = cost.epoch(run.shape, run.recipe, run.config, masks, run.pipeline.calls)
    loop.nfe = cost.add(loop.nfe, spent)
    loop.speed.worked(masks, spent)
    scalars = {k: v for k, v in summary.items() if np.isfinite(v)}
    scalars |= {f"update/{name}": float(value) for name, value in metrics.items()}
    loop.pending = scalars


def expect_no_compilation(loop: Loop, before: int) -> None:
    """After the second epoch of a process nothing may compile any more: a silent recompilation is a bug."""
    loop.rounds += 1
    if loop.rounds > 2 and loop.compiles.total > before:
        say(f"WARNING: {loop.compiles.total - before} programs were compiled again in epoch {loop.epoch}")
