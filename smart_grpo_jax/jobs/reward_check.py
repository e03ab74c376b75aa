"""`--mode=rewards --check`, and the short look that training takes before it begins.

Does our code give the originals' scores (stored examples, jobs/reward_examples.py)? And is this
reward, with these weights, fit to be trained on at all: does it tell images apart, does it listen to the
prompt, is it a number?
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import RewardError, UserError
from smart_grpo_jax.core.schema import weight_of
from smart_grpo_jax.data import prompts as prompt_data
from smart_grpo_jax.jobs import reward_examples
from smart_grpo_jax.jobs.reward_bench import entries, image_size
from smart_grpo_jax.rewards import base, mixture
from smart_grpo_jax.runtime.progress import Heartbeat, say, table
from smart_grpo_jax.worlds.shapes import grammar
from smart_grpo_jax.worlds.shapes.render import render
from smart_grpo_jax.worlds.shapes.scenes import SIZE, sample_scene

PROBES = 8
"""Images of a look."""

SAME = 1e-6
"""Scores this near to each other, against the largest of them, are one score: float32 has no finer steps."""


class Verdict(NamedTuple):
    """What was found of one reward; `state` is ok, or what is wrong."""

    reward: str
    state: str
    detail: str


def before_training(
    config: Config, reward: base.Reward, search_reward: base.Reward, prompts: Sequence[str]
) -> None:
    """RewardError where a reward that this run learns or searches from is constant, prompt-blind or NaN, or
    where its weights come with examples and do not give their scores."""
    named = entries(config)
    refuse(as_verdict(stored(reward_examples.read(file), named)) for file in example_files(named, ""))
    images, texts = probes(*image_size(config), prompts)
    refuse(quick(config.rewards, reward, images, texts))
    if config.search_reward:
        refuse(quick(config.search_reward, search_reward, images, texts))


class Seen(NamedTuple):
    """Scores of the same images with their own prompts, with their neighbours', all with the first one, and
    whether the reward is told the prompt at all."""

    own: Float[np.ndarray, " n"]
    others: Float[np.ndarray, " n"]
    first: Float[np.ndarray, " n"]
    listens: bool


def quick(
    spec: Mapping[str, Any],
    reward: base.Reward,
    images: Float[np.ndarray, "n H W 3"],
    prompts: Sequence[str],
) -> list[Verdict]:
    """A verdict on every weighted reward of a mixture that is in the graph; three calls of one program.

    `images` differ, and `prompts` belong to them one by one (`probes`).
    """
    seen = look(spec, reward, images, prompts)
    return [judged(name, *seen[name]) for name in seen if weight_of(spec[name])]


def look(
    spec: Mapping[str, Any],
    reward: base.Reward,
    images: Float[np.ndarray, "n H W 3"],
    prompts: Sequence[str],
) -> dict[str, Seen]:
    """What each reward of a mixture says of the images."""
    score = jax.jit(lambda params, images, ctx: reward.score(params, images, ctx, None).parts)
    own = reward.prepare(prompts)
    turned = reward.prepare([*prompts[1:], prompts[0]])
    first = reward.prepare([prompts[0]] * len(prompts))
    parts = [score(reward.params, images, ctx) for ctx in (own, turned, first)]
    differ = len(set(map(str, prompts))) > 1
    return {
        name: Seen(
            *(np.asarray(one[name], np.float64) for one in parts),
            listens=differ and bool(jax.tree.leaves(own[name])),
        )
        for name in spec
        if name in parts[0]
    }


def judged(
    name: str,
    own: Float[np.ndarray, " n"],
    others: Float[np.ndarray, " n"],
    first: Float[np.ndarray, " n"],
    listens: bool,
) -> Verdict:
    """The verdict on scores of the same images with their own, other, and one and the same prompt."""
    every = np.concatenate([own, others, first])
    if not np.isfinite(every).all():
        missing = int((~np.isfinite(own)).sum())
        return Verdict(name, "NaN", f"no number for {missing} of {len(own)} images")
    step = SAME * max(float(np.abs(every).max()), 1e-30)
    if np.ptp(first) <= step:
        return Verdict(name, "constant", f"{first[0]:.4g} for {len(first)} different images of one prompt")
    if listens and np.abs(own - others).max() <= step:
        return Verdict(name, "prompt-blind", "the same scores whatever the prompts")
    return Verdict(name, "ok", f"{first.min():.4g} … {first.max():.4g}")


def refuse(verdicts: Iterable[Verdict]) -> None:
    """RewardError where a reward must not be trained on."""
    for found in verdicts:
        if found.state != "ok":
            raise RewardError(
                f"rewards.{found.reward}: is {found.state} ({found.detail}); see --mode=rewards --check, "
                "or set train.check_rewards=false"
            )


def probes(height: int, width: int, prompts: Sequence[str]) -> tuple[Float[np.ndarray, "n H W 3"], list[str]]:
    """Images that differ in every way, each with a prompt; the same ones in every run.

    At the shapes world's size its own prompts get pictures that show them: a strict judge gives 0 to any
    other. Elsewhere: noise, blurred noise, ramps, stripes and flat colours.
    """
    found: dict[str, str] = {}
    for prompt in prompts:
        found.setdefault(str(prompt), prompt)  # the prompt itself: it may carry metadata
        if len(found) == PROBES:
            break
    texts = [list(found.values() or ["a photo"])[i % max(1, len(found))] for i in range(PROBES)]
    if (height, width) == (SIZE, SIZE) and in_the_world(texts):
        return np.asarray(shown(grammar.encode(texts))), texts
    return varied(height, width), texts


@jax.jit
def shown(spec: Int[Array, "n 7"]) -> Float[Array, "n 24 24 3"]:
    """One picture for each prompt of the shapes world."""
    return render(sample_scene(jax.random.key(0), spec))


def in_the_world(texts: Sequence[str]) -> bool:
    """Whether all these are prompts of the shapes world."""
    try:
        grammar.encode(texts)
    except UserError:
        return False
    return True


@functools.cache
def varied(height: int, width: int) -> Float[np.ndarray, "8 H W 3"]:
    """Eight images of this size."""
    rng = np.random.default_rng(0)
    y, x = (axis[..., None] for axis in np.mgrid[:height, :width] / max(height, width))
    noise = rng.uniform(size=(height, width, 3))
    coarse = rng.uniform(size=(5, 5, 3))
    rows, columns = np.arange(height) * 5 // height, np.arange(width) * 5 // width
    disc = ((x - 0.5 * width / max(height, width)) ** 2 + (y - 0.5 * height / max(height, width)) ** 2) < 0.1
    paint = lambda colour: np.broadcast_to(np.asarray(colour, float), (height, width, 3))
    images = [
        noise,
        coarse[rows][:, columns],
        np.concatenate([x, y, 1 - x * y], -1),
        np.where(np.sin(40 * x) > 0, paint((0.9, 0.1, 0.1)), paint((0.1, 0.1, 0.9))),
        paint((0.2, 0.6, 0.3)),
        np.where(disc, paint((0.9, 0.8, 0.1)), paint((0.1, 0.2, 0.4))),
        np.clip(0.5 + 0.1 * (noise - 0.5) + 0.4 * (coarse[rows][:, columns] - 0.5), 0, 1),
        paint((0.97, 0.97, 0.97)) * (1 - 0.5 * y),
    ]
    return np.stack(images).astype(np.float32)


def job(config: Config, workdir: str, examples: str = "") -> None:
    """Print the table of all checks; RewardError (exit code 5) where a reward is off or unfit.

    `examples` is a JSON file of scores that the run's own rewards must give; one beside a reward's weights
    is taken as well.
    """
    del workdir
    rows = [fixture(file) for file in sorted(reward_examples.FIXTURES.glob(f"*/{reward_examples.NAME}"))]
    named = entries(config)
    for file in example_files(named, examples):
        rows.append(stored(reward_examples.read(file), named))
    texts = prompt_data.load(config.prompts.source).prompts
    images, prompts = probes(*image_size(config), texts)
    for name, entry in named.items():
        with Heartbeat(f"checking {name}"):
            rows += fit(config, name, entry, images, prompts)
    say(table(rows, ("reward", "compared with", "verdict", "what was found")))
    bad = [f"{row.reward} is {row.state}" for row in map(as_verdict, rows) if row.state != "ok"]
    if bad:
        raise RewardError(f"rewards: {'; '.join(bad)}")


Row = tuple[str, str, str, str]


def as_verdict(row: Row) -> Verdict:
    """A row of the table without what was compared."""
    return Verdict(row[0], row[2], row[3])


def example_files(named: Mapping[str, Any], given: str) -> list[Path]:
    """The given file of examples, and those that lie beside weights."""
    found = [Path(given)] if given else []
    for entry in named.values():
        path = mixture.options_of(entry).get("path")
        if path is not None:
            folder = Path(path) if Path(path).is_dir() else Path(path).parent
            found.append(folder / reward_examples.NAME)
    return [file for file in dict.fromkeys(found) if file.is_file() or str(file) == given]


def fixture(file: Path) -> Row:
    """The package's own examples, with the tiny weights beside them."""
    with Heartbeat(f"checking {file.parent.name}"):
        found = reward_examples.read(file)
        score = base.load_reward(found.reward, found.weights, **found.options)
        return compared(
            found, score, file.parent.name, f"{len(found.examples)} scores of the original's code"
        )


def stored(found: reward_examples.Examples, named: Mapping[str, Any]) -> Row:
    """A user's examples, with the weights that the run would use."""
    if found.reward not in named:
        known = ", ".join(named)
        raise UserError(f"{found.file}: reward: got {found.reward!r}, wanted one of the run's own ({known})")
    score = base.load_reward(found.reward, **mixture.options_of(named[found.reward]) | dict(found.options))
    return compared(found, score, found.reward, f"{len(found.examples)} scores of {found.file.name}")


def compared(found: reward_examples.Examples, score: reward_examples.Score, name: str, what: str) -> Row:
    """The worst of the examples decides."""
    ours = reward_examples.scores(score, found.examples)
    error, place = reward_examples.worst(found.examples, ours)
    example = found.examples[place]
    numbers = f"{ours[place]:.6g}, stored {example.score:.6g} ± {example.tolerance:.2g}"
    return name, what, "ok" if error <= 1 else "off", f"worst {numbers} ({example.image.name})"


def fit(
    config: Config,
    name: str,
    entry: Any,
    images: Float[np.ndarray, "n H W 3"],
    prompts: Sequence[str],
) -> list[Row]:
    """One reward of the run on the probes, and what bfloat16 would cost it."""
    options = mixture.options_of(entry)
    alone = {name: options | {"weight": 1.0}}
    reward = mixture.mixture(alone, config.host)
    if reward.host is not None:
        return [(name, f"{len(images)} probes", *outside(reward, images, prompts))]
    seen = look(alone, reward, images, prompts)[name]
    verdict = judged(name, *seen)
    rows = [(name, f"{len(images)} probes", verdict.state, verdict.detail)]
    if jax.tree.leaves(reward.params) and verdict.state == "ok":
        rows.append((name, "bfloat16", "ok", drift(name, options, images, prompts[0], seen.first)))
    return rows


def outside(
    reward: base.Reward, images: Float[np.ndarray, "n H W 3"], prompts: Sequence[str]
) -> tuple[str, str]:
    """Whether a server or a host function answers; a detector may well give 0 to every probe."""
    assert reward.host is not None
    found = reward.host(base.eight_bit(images), prompts, [f"check/{i}" for i in range(len(prompts))])
    missing = [error for error in found.errors if error]
    if not np.isfinite(found.value).all():
        return "failed", f"{len(missing)} of {len(images)}: {missing[0] if missing else 'NaN'}"
    return "ok", f"{found.value.min():.4g} … {found.value.max():.4g}"


def drift(
    name: str,
    options: Mapping[str, Any],
    images: Float[np.ndarray, "n H W 3"],
    prompt: str,
    scores: Float[np.ndarray, " n"],
) -> str:
    """RMS of (bfloat16 - float32) against the spread of the images of one prompt, each without its mean:
    what every image of a group gains, no advantage sees. `scores` are those of the dtype in `options`."""
    wide = options.get("dtype", "float32") == "float32"
    other = base.load_reward(name, **{**options, "dtype": "bfloat16" if wide else "float32"})
    values = scores, other(jnp.asarray(images), [prompt] * len(images)).astype(np.float64)
    full, narrow = (value - value.mean() for value in (values if wide else values[::-1]))
    share = float(np.sqrt(np.mean((narrow - full) ** 2)) / full.std())
    return f"drifts by {share:.2%} of the spread ({full.std():.3g}) of {len(images)} images of one prompt"
