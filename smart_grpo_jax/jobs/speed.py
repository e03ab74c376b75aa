"""How fast a run is, in numbers that explain themselves: utilisation, rates, and where time and work go.

Time is measured where the loop waits anyway: no device is asked to finish anything earlier for this.
Rollout, search, decode and reward are one program, whose parts no clock on the host can tell apart; they
are told by their work, counted once from the functions themselves. So `wall/share/…` are shares of time
and `work/…` shares of operations, and neither is made from the other.

Work is what the model asks for: real images, no padding, nothing recomputed. Utilisation (MFU) is that work
per second over the published bf16 peak of the chips; where a chip's peak is not known, the rate stands alone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from smart_grpo_jax.core.contradictions import LIKELIHOOD
from smart_grpo_jax.core.types import PyTree, VelocityFn
from smart_grpo_jax.jobs import assemble
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.jobs.speed_text import PHASES, ROLLOUT, name_of
from smart_grpo_jax.maths import flops
from smart_grpo_jax.policy import cost, credit
from smart_grpo_jax.runtime.compile_cache import compile_seconds
from smart_grpo_jax.runtime.topologies import chip_of


def prices(run: Run, trainable: PyTree) -> dict[str, float]:
    """FLOPs of one image in one call of each function, guidance inside; traced on shapes, never run."""
    ways, fns = run.fns.ways, run.fns
    texts = run.prompts.prompts[:1] * ways
    rows = lambda a: jax.ShapeDtypeStruct((ways, *a.shape[1:]), a.dtype)
    cond = jax.tree.map(rows, run.frozen["negative"])  # every prompt has the shape of this one
    number = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x, t = number((ways, *run.shape.latent)), number((ways,))
    params = run.rollout_params(trainable)
    bound, decoder = params["policy"], params["decoder"]
    images = jax.eval_shape(fns.decode, decoder, x)
    guided, searching, taught = velocities(run)
    judged = params["reward"], images, run.reward.prepare(texts)

    def loss(learned: PyTree, frozen: PyTree, x: Any, t: Any, cond: Any) -> Any:
        return taught(run.policy.bind(frozen, learned), x, t, cond).sum()

    def price(fn: Callable[..., Any], *args: Any) -> float:
        return flops.count(fn, *args) / ways

    found = {
        "velocity": price(guided, bound, x, t, cond),
        "decode": price(fns.decode, decoder, x),
        "reward": price(fns.score, *judged, None),
        "unfinished reward": price(fns.score, *judged, number(())),
        "gradient": price(jax.grad(loss), trainable, run.frozen, x, t, cond),
    }
    if run.shape.searched_members:
        tried = (
            params.get("search_reward", params["reward"]),
            images,
            run.search_reward.prepare(texts),
            number(()),
        )
        same = searching is guided
        found["search velocity"] = found["velocity"] if same else price(searching, bound, x, t, cond)
        found["search reward"] = price(fns.search_score, *tried)
    if run.recipe.loss not in LIKELIHOOD:
        found["old"] = price(taught, bound, x, t, cond)
    if run.recipe.use_kl:
        found["reference"] = price(taught, run.policy.reference(run.frozen), x, t, cond)
    return found


def velocities(run: Run) -> tuple[VelocityFn, VelocityFn, VelocityFn]:
    """The velocity of the path, of the search and of the update as if memory were no matter: nothing is
    computed twice, and attention is two products that the counter sees."""
    config, pipe = run.config, run.pipeline
    memory, model = (
        dataclasses.replace(config.memory, remat="none"),
        dataclasses.replace(config.model, attention="xla"),
    )
    velocity = assemble.raw_velocity(dataclasses.replace(config, memory=memory, model=model), pipe, run.mesh)
    velocity = jax.jit(velocity)  # traced once for all that is counted
    scale, inside = config.sampler.guidance, config.search.guidance
    guided = pipe.guided(velocity, scale)
    searching = guided if inside in (scale, -1.0) else pipe.guided(velocity, inside)
    return guided, searching, guided if run.recipe.loss in LIKELIHOOD else pipe.unguided(velocity, scale)


def work(run: Run, price: Mapping[str, float], masks: credit.Masks) -> dict[str, float]:
    """FLOPs of an epoch by part: each function's price times the images that it sees."""
    seen = cost.images_seen(run.shape, run.recipe, run.config, masks)
    judge = price["decode"] + price.get("search reward", 0.0)
    forecast = seen["forecast"] * price.get("search velocity", 0.0)
    state = price["gradient"] + price.get("old", 0.0) + price.get("reference", 0.0)
    finished = seen["judged"] - seen["unfinished"]
    return {
        "path": seen["path"] * price["velocity"],
        "search": forecast + seen["search"] * judge,
        "decode": seen["judged"] * price["decode"],
        "reward": finished * price["reward"] + seen["unfinished"] * price["unfinished reward"],
        "update": seen["learned"] * state,
    }


class Speed:
    """Where time and work went since the last line."""

    def __init__(self, run: Run, trainable: PyTree, priced: Callable[..., Mapping[str, float]]) -> None:
        self._run = run
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), trainable)
        pool = ThreadPoolExecutor(1, "prices")  # while the first programs compile
        self._price = pool.submit(priced, run, shapes)
        pool.shutdown(wait=False)
        self._devices = run.mesh.size
        chip = chip_of(run.mesh.devices.flat[0].device_kind)
        self._peak = chip.flops * self._devices if chip else None
        self._begin()

    def _begin(self) -> None:
        self._since, self._compiled = time.monotonic(), compile_seconds()
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._work: dict[str, float] = collections.defaultdict(float)
        self._calls = self._images = 0

    def _told(self) -> float:
        """Seconds that already belong to something."""
        return sum(self._spent.values()) + compile_seconds() - self._compiled

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body's time is this phase's, without what an inner phase or the compiler takes of it."""
        started, told = time.monotonic(), self._told()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self.add(name, max(0.0, time.monotonic() - started - (self._told() - told)))

    def add(self, name: str, seconds: float) -> None:
        """Seconds of a phase that was timed elsewhere."""
        self._spent[name] += seconds

    def worked(self, masks: credit.Masks, spent: Mapping[str, int]) -> None:
        """An epoch is done; `spent` are its calls as policy/cost.py counts them."""
        for part, operations in work(self._run, self._price.result(), masks).items():
            self._work[part] += operations
        self._calls += spent["velocity"] + spent["backward"]
        self._images += spent["images"]

    def told(self) -> dict[str, float]:
        """The scalars of a line, and a new beginning; nothing where no epoch was worked since the last."""
        seconds = time.monotonic() - self._since
        spent, done = dict(self._spent), dict(self._work)
        spent["compile"] = compile_seconds() - self._compiled
        calls, images = self._calls, self._images
        self._begin()
        total = sum(done.values())
        if not total:
            return {}
        spent["other"] = max(0.0, seconds - sum(spent.values()))
        training = max(seconds - spent.get("evaluate", 0.0), 1e-9)
        rates = self._rates("", total, training)
        for phase, parts in (("/rollout", ROLLOUT), ("/update", ("update",))):
            rates |= self._rates(phase, sum(done[part] for part in parts), spent.get(phase[1:], 0.0))
        return {
            **rates,
            "wall/images_per_second_per_device": images / training / self._devices,
            "wall/nfe_per_second": calls / training,
            **{name_of(phase): spent.get(phase, 0.0) / seconds for phase in PHASES},
            **{f"work/{part}": operations / total for part, operations in done.items()},
        }

    def _rates(self, phase: str, operations: float, seconds: float) -> dict[str, float]:
        if seconds <= 0:
            return {}
        rate = operations / seconds
        found = {f"wall/flops_per_second{phase}": rate}
        return found | ({f"wall/mfu{phase}": rate / self._peak} if self._peak else {})
