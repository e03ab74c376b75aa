"""Make the embedded world's pipeline from nothing: autoencoder, then flow matching, then checks.

The flow model learns captions of which a set share is wrong, so that the result draws cleanly and
listens badly: head-room for reinforcement learning, as Stable Diffusion 3.5 has on GenEval. Both text
encoders learn with it. Everything follows from the seed. See docs/world.md for the measured run.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.data import prompts
from smart_grpo_jax.hub import pipeline as hub
from smart_grpo_jax.hub.folder import save_pipeline
from smart_grpo_jax.jobs.pretrain_parts import (
    NULL_TOKENS,
    Captions,
    Parts,
    captions,
    condition,
    fresh_flow,
    tokenizers,
    world,
)
from smart_grpo_jax.maths import rng
from smart_grpo_jax.models.mmdit import MMDiT
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig, normalise
from smart_grpo_jax.runtime.progress import duration, say, table
from smart_grpo_jax.worlds.shapes import grammar, scenes
from smart_grpo_jax.worlds.shapes.judge import judge
from smart_grpo_jax.worlds.shapes.render import render

SCAN = 25
"""Optimizer steps per jitted call. The autoencoder takes single steps: on CPU the gradient of a small
convolution is 4 times slower inside a loop (46 against 212 images/s on 2 cores)."""

SHIFT = 1.0
"""The scheduler's shift: 144-dimensional latents need none (3 is for 65,536)."""

LATENT_NOISE = 0.05
"""Noise on the latents that the decoder is polished with (their own std is near 0.8)."""


class Trained(NamedTuple):
    """A network's averaged parameters and its last loss."""

    params: PyTree
    loss: float


def fit(
    loss_fn: Callable[..., Array],
    params: PyTree,
    key: Array,
    steps: int,
    rate: float,
    name: str,
    scan: int = SCAN,
    watch: Callable[[int, PyTree], None] = lambda step, params: None,
    data: tuple[PyTree, ...] = (),
) -> Trained:
    """AdamW with warm-up and cosine decay on loss_fn(params, key, *data); returns the moving average of the
    weights, and shows it to `watch` ten times on the way."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(200, steps // 10 + 1), steps, rate / 20)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))

    def step(carry: tuple[PyTree, PyTree, PyTree, Array], key: Array, data: Any) -> tuple[Any, Array]:
        params, state, mean, count = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, key, *data)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.998, (1 + count) / (10 + count))
        mean = jax.tree.map(lambda a, b: a * decay + b * (1 - decay), mean, params)
        return (params, state, mean, count + 1), loss

    @partial(jax.jit, donate_argnums=0)
    def run(carry: tuple[PyTree, PyTree, PyTree, Array], first: Array, data: Any) -> tuple[Any, Array]:
        if scan == 1:
            return step(carry, jax.random.fold_in(key, first), data)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(jnp.arange(scan))
        carry, losses = jax.lax.scan(lambda c, k: step(c, k, data), carry, keys)
        return carry, losses.mean()

    copy = jax.tree.map(jnp.copy, params)
    carry, start, loss = (params, tx.init(params), copy, jnp.zeros(())), time.time(), 0.0
    calls = -(-steps // scan)
    for call in range(calls):
        carry, loss = run(carry, jnp.asarray(call * scan), data)
        if call % max(1, calls // 40) == 0 or call == calls - 1:
            spent = time.time() - start
            left = spent / (call + 1) * (calls - call - 1)
            done = (call + 1) * scan
            say(f"{name} step {done}/{steps} | loss {float(loss):.4f} | {spent:.0f} s | ETA {left:.0f} s")
        if (call + 1) % max(1, calls // 10) == 0:
            watch((call + 1) * scan, carry[2])
    return Trained(carry[2], float(loss))


def pictures(key: Array, batch: int, caption_noise: float) -> tuple[Array, Array]:
    """(images in [-1,1], captions as spec rows) of fresh scenes from the whole grammar."""
    prompt_key, scene_key, noise_key = jax.random.split(key, 3)
    spec = scenes.sample_prompts(prompt_key, batch)
    images = render(scenes.sample_scene(scene_key, spec)) * 2 - 1
    return images, scenes.corrupt(noise_key, spec, caption_noise)


def train_vae(config: VAEConfig, settings: Config) -> Trained:
    """Absolute plus squared error and a weak KL to N(0, I), which keeps the latents smooth."""
    vae = AutoencoderKL(config)
    key = rng.key(settings.seed, "pretrain")
    params = vae.init(jax.random.fold_in(key, 0), jnp.zeros((1, 24, 24, 3)))["params"]

    def loss_fn(params: PyTree, key: Array) -> Array:
        image_key, noise_key = jax.random.split(key)
        images, _ = pictures(image_key, settings.pretrain.batch, 0.0)
        mean, logvar = cast(tuple[Array, Array], vae.apply({"params": params}, images, method="encode"))
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(noise_key, mean.shape)
        error = cast(Array, vae.apply({"params": params}, z, method="decode")) - images
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        return jnp.abs(error).mean() + 2 * (error**2).mean() + 1e-3 * kl

    return fit(
        loss_fn, params, jax.random.fold_in(key, 1), settings.pretrain.vae_steps, 3e-3, "autoencoder", 1
    )


def polish_decoder(config: VAEConfig, params: PyTree, settings: Config) -> Trained:
    """The decoder alone, with the encoder (and so the latents) fixed: edges and corners get sharp. Latents
    carry a little noise, as those of the flow model will."""
    vae = AutoencoderKL(config)
    key = jax.random.fold_in(rng.key(settings.seed, "pretrain"), 5)
    rest = {name: part for name, part in params.items() if name != "decoder"}

    def loss_fn(decoder: PyTree, key: Array) -> Array:
        image_key, noise_key = jax.random.split(key)
        images, _ = pictures(image_key, settings.pretrain.batch, 0.0)
        z = vae.apply({"params": params}, images, method="encode")[0]
        z = z + LATENT_NOISE * jax.random.normal(noise_key, z.shape)
        drawn = vae.apply({"params": {**rest, "decoder": decoder}}, z, method="decode")
        error = cast(Array, drawn) - images
        return jnp.abs(error).mean() + 2 * (error**2).mean()

    steps = settings.pretrain.decoder_steps
    tuned = fit(loss_fn, params["decoder"], jax.random.fold_in(key, 1), steps, 2e-3, "decoder", 1)
    return Trained({**rest, "decoder": tuned.params}, tuned.loss)


class Data(NamedTuple):
    """Normalised latents of rendered scenes, and the prompt each scene satisfies."""

    latents: Float[Array, "n h w c"]
    spec: Int[Array, "n 7"]


def dataset(config: VAEConfig, params: PyTree, settings: Config) -> tuple[VAEConfig, Data]:
    """Rendered scenes as latents of zero mean and unit variance, and the config that holds the scaling."""
    key = jax.random.fold_in(rng.key(settings.seed, "pretrain"), 4)

    @jax.jit
    def some(i: Array) -> tuple[Array, Array]:
        images, spec = pictures(jax.random.fold_in(key, i), 512, 0.0)
        return AutoencoderKL(config).apply({"params": params}, images, method="encode")[0], spec

    parts = [some(jnp.asarray(i)) for i in range(-(-settings.pretrain.images // 512))]
    raw = np.concatenate([np.asarray(z) for z, _ in parts])
    scaled = dataclasses.replace(
        config, shift_factor=round(float(raw.mean()), 6), scaling_factor=round(float(1 / raw.std()), 6)
    )
    spec = jnp.concatenate([s for _, s in parts])
    return scaled, Data(normalise(scaled, jnp.asarray(raw)), spec)


def train_flow(
    parts: Parts,
    data: Data,
    text: Captions,
    settings: Config,
    watch: Callable[[int, PyTree], None] = lambda step, params: None,
) -> Trained:
    """Flow matching, |v - (x1 - x0)|² at stratified times, with empty captions for guidance.

    Each cycle is one cosine with a caption noise of its own; the next starts from its averaged weights.
    """
    net, batch = MMDiT(parts.transformer), settings.pretrain.batch
    key = jax.random.fold_in(rng.key(settings.seed, "pretrain"), 2)

    def loss_fn(params: PyTree, key: Array, caption_noise: float) -> Array:
        pick, noise, time_key, drop, wrong = jax.random.split(key, 5)
        index = jax.random.randint(pick, (batch,), 0, len(data.latents))
        x0 = data.latents[index]
        row = text.rows(scenes.corrupt(wrong, data.spec[index], caption_noise))
        row = jnp.where(jax.random.bernoulli(drop, settings.pretrain.dropout, (batch,)), 0, row)
        prompt = condition(parts, params, text.ids[row], text.ids_2[row], NULL_TOKENS)
        t = (jnp.arange(batch) + jax.random.uniform(time_key, (batch,))) / batch
        x1 = jax.random.normal(noise, x0.shape)
        wide = t[:, None, None, None]
        v = net.apply(
            {"params": params["transformer"]},
            (1 - wide) * x0 + wide * x1,
            t,
            prompt.tokens,
            prompt.pooled,
            repeats=prompt.repeats,
        )
        return ((cast(Array, v) - (x1 - x0)) ** 2).mean()

    trained = Trained(fresh_flow(parts, key, data.latents.shape[1:], text), 0.0)
    plan = list(zip(settings.pretrain.flow_steps, settings.pretrain.caption_noise, strict=True))
    for cycle, (steps, caption_noise) in enumerate(plan):
        draws = jax.random.fold_in(key, 3 + cycle)
        loss = partial(loss_fn, caption_noise=caption_noise)
        name = f"flow model {cycle + 1}/{len(plan)}"
        trained = fit(loss, trained.params, draws, steps, 2e-3, name, watch=watch)
    return trained


def job(config: Config, out: str) -> None:
    """`--mode=pretrain`: write the whole pipeline to `out`, then look at what it can do."""
    started, folder = time.time(), Path(out)
    files, both = tokenizers(folder)
    text = captions(both)
    parts = world(len(json.loads(files["tokenizer"]["vocab.json"])))
    autoencoder = train_vae(parts.vae, config)
    vae, data = dataset(parts.vae, autoencoder.params, config)
    autoencoder = polish_decoder(vae, autoencoder.params, config)
    parts = parts._replace(vae=vae)
    flow = train_flow(parts, data, text, config)
    save_pipeline(
        folder,
        transformer=(parts.transformer, flow.params["transformer"]),
        vae=(vae, autoencoder.params),
        text_encoder=(parts.text, flow.params["text_encoder"]),
        text_encoder_2=(parts.text_2, flow.params["text_encoder_2"]),
        tokenizers=files,
        scheduler={"num_train_timesteps": 1000, "shift": SHIFT},
    )
    say(f"pipeline in {folder} after {duration(time.time() - started)}")
    show(folder)


def show(folder: str | Path) -> None:
    """The checks: what the autoencoder costs, and accuracy by guidance, steps and task."""
    pipe = hub.load_pipeline(folder)
    key = jax.random.key(7)
    spec = scenes.sample_prompts(key, 512)
    images = render(scenes.sample_scene(key, spec))
    for name, pictures_ in (
        ("rendered", images),
        ("through the autoencoder", pipe.decode(pipe.encode_images(images))),
    ):
        verdict = judge(pictures_, spec)
        say(f"{name}: graded {float(verdict.graded.mean()):.3f}, strict {float(verdict.strict.mean()):.3f}")
    items = prompts.evaluation_items(prompts.load("shapes:heldout"), 480)
    wanted = [item.text for item in items]
    spec = jnp.asarray(grammar.encode(wanted))
    rows = []
    for guidance, steps in ((1.0, 10), (2.0, 10), (3.0, 10), (4.5, 10), (4.5, 28), (4.5, 40), (7.0, 28)):
        verdict = judge(pipe.sample(wanted, key=key, num_steps=steps, guidance=guidance), spec)
        strict = np.asarray(verdict.strict)
        tasks = [f"{strict[np.asarray(spec[:, 0]) == t].mean():.2f}" for t in range(len(grammar.TASKS))]
        rows.append(
            [f"{guidance:g}", steps, f"{float(verdict.graded.mean()):.3f}", f"{strict.mean():.3f}", *tasks]
        )
    say(table(rows, ["guidance", "steps", "graded", "strict", *grammar.TASKS]))
