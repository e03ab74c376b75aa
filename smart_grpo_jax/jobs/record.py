"""What a run leaves behind: pictures, evaluations, the start-up box, the final table and the report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from smart_grpo_jax.core import schema
from smart_grpo_jax.core.config import searched_steps
from smart_grpo_jax.core.types import TrainState
from smart_grpo_jax.jobs import assemble, evaluate, microbatch, report, traced
from smart_grpo_jax.jobs.assemble import Run
from smart_grpo_jax.jobs.statistics import comparison
from smart_grpo_jax.maths import transition
from smart_grpo_jax.policy import cost, rollout
from smart_grpo_jax.policy.rollout import Acted, Batch
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.files import write_atomic
from smart_grpo_jax.runtime.mesh import local_devices_summary
from smart_grpo_jax.runtime.progress import say
from smart_grpo_jax.runtime.run_folder import RunFolder

FIGURE_PROMPTS = 4
"""Prompts in the strip of one-step decodes."""

TILE = 96
"""Least side of a picture in a grid, in pixels; small pictures are enlarged without smoothing."""

PATHS = {"x", "x_next", "mean", "log_prob", "one_step", "found"}
"""Fields of a rollout whose first axis is the step and whose second is the image."""


def grid(images: np.ndarray, columns: int = 8) -> Image.Image:
    """Pictures [n,H,W,3] in [0,1] as one sheet."""
    scale = max(1, -(-TILE // images.shape[2]))
    tiles = np.repeat(np.repeat(to_bytes(images), scale, 1), scale, 2)
    _, height, width, _ = tiles.shape
    rows = -(-len(tiles) // columns)
    gap = 4
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return Image.fromarray(sheet)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """8-bit pixels: round(255 x)."""
    return np.round(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)


def png(image: Image.Image, info: Any = None) -> bytes:
    """The file's bytes, with text chunks if given."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def evaluation(folder: RunFolder, epoch: int, result: evaluate.Evaluation) -> dict[str, float]:
    """Store an evaluation (scores per prompt, pictures) and return its scalars."""
    means = result.means()
    scalars = {f"eval/{name}": value for name, value in means.items()}
    if "second/graded" in means and "shapes" in means:
        scalars["eval/judge_gap"] = means["shapes"] - means["second/graded"]
    if distributed.is_main():
        buffer = io.BytesIO()
        names: dict[str, Any] = {
            f"score:{name}": values.astype(np.float32) for name, values in result.scores.items()
        }
        np.savez_compressed(
            buffer, prompts=np.asarray(result.prompts), images=to_bytes(result.images), **names
        )
        write_atomic(folder.sub("eval") / f"{epoch}.npz", buffer.getvalue())
        write_atomic(folder.sub("samples") / f"{epoch}.png", png(grid(result.images)))
    return scalars


def load_evaluation(path: Path) -> evaluate.Evaluation:
    """An evaluation as `evaluation` stored it."""
    with np.load(path, allow_pickle=False) as stored:
        scores = {k.removeprefix("score:"): stored[k] for k in stored.files if k.startswith("score:")}
        return evaluate.Evaluation([str(p) for p in stored["prompts"]], scores, stored["images"] / 255.0)


def join(parts: Sequence[Acted]) -> Acted:
    """Rollouts of several calls as one: images are the second axis of paths, the first of results."""
    if len(parts) == 1:
        return parts[0]
    along = lambda axis: lambda *leaves: jnp.concatenate(leaves, axis)
    joined = {
        name: jax.tree.map(along(int(name in PATHS)), *(getattr(part, name) for part in parts))
        for name in Acted._fields
    }
    return Acted(**joined)


def join_batches(batches: Sequence[Batch]) -> Batch:
    """The prompts of several calls as one table."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)


def headline(scalars: dict[str, float]) -> dict[str, Any]:
    """The few numbers of a line on the screen."""
    names = {
        "train/reward": "reward",
        "eval/reward": "held-out",
        "eval/second/strict": "strict (2nd judge)",
        "update/kl": "kl",
        "update/clip_fraction": "clipped",
        "train/zero_std_groups": "flat groups",
    }
    fields: dict[str, Any] = {label: scalars[name] for name, label in names.items() if name in scalars}
    last = [v for k, v in scalars.items() if k.startswith("search/") and k.endswith("/last")]
    first = [v for k, v in scalars.items() if k.startswith("search/") and k.endswith("/first")]
    if last and last != first:
        fields["search gain"] = float(np.mean(last) - np.mean(first))
    fields["NFE"] = f"{scalars['nfe/velocity']:.2e}"
    return fields


def summary(run: Run, state: TrainState, path: Path, epoch: int, resumed: bool) -> list[tuple[str, str]]:
    """The rows of the start-up box."""
    config = run.config
    count = lambda tree: sum(int(a.size) for a in jax.tree.leaves(tree))
    window = traced.epoch_window(config, epoch)
    mask = traced.search_mask(config, run.times, window.stochastic)
    s = config.search
    search = "off (Flow-GRPO)"
    if searched_steps(config):
        where = ", ".join(f"{j} (t={run.times[j]:.2f})" for j in np.flatnonzero(mask))
        search = f"{s.rounds} × {s.candidates}, elite {s.elite:g}, steps {where}, credit {s.credit}"
    masks = traced.credit_masks(run.config, run.times, epoch, np.ones(config.prompts.groups, bool))
    price = cost.epoch(run.shape, run.recipe, config, masks, run.pipeline.calls)
    negatives = "" if config.sampler.guidance == 1 else f", guidance {config.sampler.guidance:g}"
    known = len(set(run.prompts.prompts))
    return [
        ("run", str(path)),
        ("start", f"resumed after epoch {epoch}" if resumed else "fresh"),
        ("model", f"{config.model.path}, {count(run.frozen['params']):,} parameters, {config.model.dtype}"),
        ("trained", f"{count(state.params):,} parameters ({config.adapter.kind})"),
        ("devices", f"{local_devices_summary()}; mesh {dict(run.mesh.shape)}"),
        ("groups × members", f"{config.prompts.groups} × {config.prompts.members} of {known} prompts"),
        ("sampler", f"{config.sampler.transition}, {run.shape.stop} of {config.sampler.steps} steps, "
                    f"noise {config.sampler.noise_level:g}{negatives}"),
        ("search", search),
        ("learning", f"{config.train.loss}, {config.train.epochs} epochs × "
                     f"{run.recipe.updates * run.recipe.passes} updates, lr {config.train.learning_rate:g}"),
        ("at once", microbatch.words(microbatch.numbers_of(config), searched_steps(config))),
        ("rewards", ", ".join(f"{k} {schema.weight_of(v):g}" for k, v in config.rewards.items())),
        ("per epoch", f"{price['velocity']:,} network calls, {price['backward']:,} backward, "
                      f"{price['decode']:,} decodes"),
    ]  # fmt: skip


def one_step_decodes(
    run: Run, act: Callable[..., Acted], trainable: Any, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """What each state on the way decodes to in one step, without and with the search: twice
    [steps, prompts, H, W, 3] in 8 bits. `act` is the rollout of training, so that it need not be compiled
    again; the first member of each of its groups is looked at, and is among those that search."""
    config = run.config.prompts
    size, _ = assemble.training_calls(run.config, run.mesh)
    texts = texts[:size]
    knobs = traced.rollout_knobs(run.config, run.times, 0)
    knobs = knobs._replace(seed=jnp.uint32(evaluate.EVAL_SEED), execute_search=jnp.asarray(True))
    batch, _ = assemble.make_batch(run, texts, size, run.reward, range(len(texts)))
    params = run.rollout_params(trainable)

    @jax.jit
    def decode(params: Any, xs: Any, times: Any, cond: Any) -> Any:
        def look(state: tuple[Any, Any]) -> Any:
            x, t = state
            v = run.fns.velocity(params["policy"], x, jnp.full(x.shape[0], t), cond)
            return run.fns.decode(params["decoder"], transition.one_step(x, v, t))

        return jax.lax.map(look, (xs, times))

    def pictures(knobs: rollout.Knobs) -> np.ndarray:
        xs = act(params, knobs, batch).x[:, :: config.members]
        return to_bytes(distributed.whole(decode(params, xs, knobs.times[: len(xs)], batch.cond)))[
            :, : len(texts)
        ]

    return pictures(knobs._replace(searched=jnp.zeros_like(knobs.searched))), pictures(knobs)


def figure_three(run: Run, folder: RunFolder, act: Callable[..., Acted], trainable: Any) -> None:
    """The paper's Figure 3 for this model, beside the same states with the noise searched."""
    if not searched_steps(run.config):
        return
    texts = [item.text for item in run.eval_items[:FIGURE_PROMPTS]]
    plain, searched = one_step_decodes(run, act, trainable, texts)
    if not distributed.is_main():
        return
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        times=run.times[: len(plain)],
        prompts=np.asarray(texts[: plain.shape[1]]),
        plain=plain,
        searched=searched,
    )
    write_atomic(folder.sub("eval") / "steps.npz", buffer.getvalue())


def finish(
    run: Run, folder: RunFolder, act: Callable[..., Acted], state: TrainState, state_hash: str
) -> None:
    """The final table, and the page to look at."""
    figure_three(run, folder, act, evaluate.evaluated_weights(run.config, state))
    if not distributed.is_main():
        return
    last = run.config.train.epochs
    base = load_evaluation(folder.file("eval") / "0.npz")
    tuned = load_evaluation(folder.file("eval") / f"{last}.npz")
    rows = comparison(base.scores, tuned.scores, base.prompts)
    evaluate.print_comparison(rows, len(base.prompts), ("base", "tuned"))
    page = report.write(folder.path)
    say(f"state {state_hash[:16]} | look at {page}")
