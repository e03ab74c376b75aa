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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import Conditioning, PyTree
from smart_grpo_jax.hub import pipeline as hub
from smart_grpo_jax.hub.folder import save_pipeline, write_text
from smart_grpo_jax.hub.tokenizers import load_tokenizer
from smart_grpo_jax.maths import rng
from smart_grpo_jax.models.clip import CLIPConfig, CLIPText
from smart_grpo_jax.models.mmdit import MMDiT, MMDiTConfig
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig, normalise
from smart_grpo_jax.runtime.progress import duration, say, table
from smart_grpo_jax.worlds.shapes import grammar, scenes, vocabulary
from smart_grpo_jax.worlds.shapes.judge import judge
from smart_grpo_jax.worlds.shapes.render import render

SCAN = 25
"""Optimizer steps per jitted call. The autoencoder takes single steps: on CPU the gradient of a small
convolution is 4 times slower inside a loop (46 against 212 images/s on 2 cores)."""

QUIET = 4.0
"""How strongly queries start out turned away from the empty T5 tokens (see `quiet_start`)."""


SHIFT = 1.0
"""The scheduler's shift: 144-dimensional latents need none (3 is for 65,536)."""

LATENT_NOISE = 0.05
"""Noise on the latents that the decoder is polished with (their own std is near 0.8)."""

NULL_TOKENS = 256
"""Empty T5 tokens that diffusers appends to the text of a pipeline without T5."""


class Parts(NamedTuple):
    """The networks of the pipeline, by config."""

    vae: VAEConfig
    transformer: MMDiTConfig
    text: CLIPConfig
    text_2: CLIPConfig


class Trained(NamedTuple):
    """A network's averaged parameters and its last loss."""

    params: PyTree
    loss: float


def world(words: int) -> Parts:
    """The sizes of the embedded world: an SD3.5-M in small, with both kinds of attention and the same 8×
    autoencoder of 16 channels."""
    text = CLIPConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=96,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=vocabulary.LENGTH,
        hidden_act="quick_gelu",
        eos_token_id=words - 1,
    )
    return Parts(
        vae=VAEConfig(
            block_out_channels=(8, 16, 16, 32),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=24,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=MMDiTConfig(
            sample_size=3,
            patch_size=1,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=3,
            joint_attention_dim=96,
            caption_projection_dim=96,
            pooled_projection_dim=80,
            pos_embed_max_size=6,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        text=text,
        text_2=dataclasses.replace(
            text,
            hidden_size=48,
            intermediate_size=144,
            projection_dim=48,
            num_attention_heads=3,
            hidden_act="gelu",
        ),
    )


def fit(
    loss_fn: Callable[[PyTree, Array], Array],
    params: PyTree,
    key: Array,
    steps: int,
    rate: float,
    name: str,
    scan: int = SCAN,
    watch: Callable[[int, PyTree], None] = lambda step, params: None,
) -> Trained:
    """AdamW with warm-up and cosine decay; returns the moving average of the weights, and shows it to
    `watch` ten times on the way."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(200, steps // 10 + 1), steps, rate / 20)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))

    def step(carry: tuple[PyTree, PyTree, PyTree, Array], key: Array) -> tuple[Any, Array]:
        params, state, mean, count = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, key)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.998, (1 + count) / (10 + count))
        mean = jax.tree.map(lambda a, b: a * decay + b * (1 - decay), mean, params)
        return (params, state, mean, count + 1), loss

    @partial(jax.jit, donate_argnums=0)
    def run(carry: tuple[PyTree, PyTree, PyTree, Array], first: Array) -> tuple[Any, Array]:
        if scan == 1:
            return step(carry, jax.random.fold_in(key, first))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, first + i))(jnp.arange(scan))
        carry, losses = jax.lax.scan(step, carry, keys)
        return carry, losses.mean()

    copy = jax.tree.map(jnp.copy, params)
    carry, start, loss = (params, tx.init(params), copy, jnp.zeros(())), time.time(), 0.0
    calls = -(-steps // scan)
    for call in range(calls):
        carry, loss = run(carry, jnp.asarray(call * scan))
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
        mean, logvar = vae.apply({"params": params}, images, method="encode")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(noise_key, mean.shape)
        error = vae.apply({"params": params}, z, method="decode") - images
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
        error = vae.apply({"params": {**rest, "decoder": decoder}}, z, method="decode") - images
        return jnp.abs(error).mean() + 2 * (error**2).mean()

    steps = settings.pretrain.decoder_steps
    tuned = fit(loss_fn, params["decoder"], jax.random.fold_in(key, 1), steps, 2e-3, "decoder", 1)
    return Trained({**rest, "decoder": tuned.params}, tuned.loss)


class Data(NamedTuple):
    """Normalised latents of rendered scenes, and the prompt each scene satisfies."""

    latents: Float[Array, "n h w c"]
    spec: Int[Array, "n 7"]


class Captions(NamedTuple):
    """Token ids of every prompt of the grammar for both encoders; row 0 is the empty prompt, row 1 + i
    belongs to the i-th smallest `code`."""

    code: Int[Array, " n"]
    ids: Int[Array, "n+1 s"]
    ids_2: Int[Array, "n+1 s"]

    def rows(self, spec: Int[Array, "b 7"]) -> Int[Array, " b"]:
        """The rows of these prompts."""
        return 1 + jnp.searchsorted(self.code, spec_code(spec))


def spec_code(spec: Int[Array, "n 7"]) -> Int[Array, " n"]:
    """One number per spec row (mixed radix; -1, "unsaid", is digit 0)."""
    code = jnp.zeros(spec.shape[0], jnp.int32)
    for column, radix in enumerate((6, 6, 7, 5, 7, 5, 5)):
        code = code * radix + spec[:, column] + 1
    return code


def captions(tokenizers: tuple[Any, Any]) -> Captions:
    """The table of all captions."""
    texts = [grammar.text(prompt) for prompt in grammar.all_prompts()]
    code = np.asarray(spec_code(jnp.asarray(grammar.encode(texts))))
    order = np.argsort(code)
    ordered = ["", *(texts[i] for i in order)]
    ids = [jnp.asarray(tokenizer(ordered), jnp.int32) for tokenizer in tokenizers]
    return Captions(jnp.asarray(code[order]), ids[0], ids[1])


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


def condition(
    parts: Parts, params: PyTree, ids: Int[Array, "b s"], ids_2: Int[Array, "b s"], repeats: int
) -> Conditioning:
    """The SD3 prompt embedding without T5: both penultimate states side by side, then one zero token."""
    encoders = (params["text_encoder"], params["text_encoder_2"])
    states, pooled = hub.text_states((parts.text, parts.text_2), jnp.float32, encoders, (ids, ids_2))
    pad = parts.transformer.joint_attention_dim - states.shape[-1]
    return Conditioning(jnp.pad(states, ((0, 0), (0, 1), (0, pad))), pooled, repeats)


def quiet_start(params: PyTree, heads: int, dim: int) -> PyTree:
    """Turn all queries away from the empty tokens in the joint attention.

    Without T5 the text ends in 256 equal zero tokens, which at a random start take 92 % of all attention
    and hide the few tokens that matter. One feature of each head is set aside: queries carry -QUIET there,
    text keys 1; a zero token has nothing else, so its normalised key lies along that feature.
    """
    query = np.zeros((heads, dim), np.float32)
    key = np.zeros((heads, dim), np.float32)
    query[:, 0], key[:, 0] = -QUIET, 1.0
    start = {"to_q": query, "add_q_proj": query, "add_k_proj": key}
    for stack in ("dual", "joint", "last"):
        if stack in params:
            for name, bias in start.items():
                if name in params[stack]["attn"]:
                    old = params[stack]["attn"][name]["bias"]
                    params[stack]["attn"][name]["bias"] = old + bias.reshape(-1)
    return params


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
        return ((v - (x1 - x0)) ** 2).mean()

    trained = Trained(fresh_flow(parts, key, data.latents.shape[1:], text), 0.0)
    noises = settings.pretrain.caption_noise
    for cycle, caption_noise in enumerate(noises):
        draws, steps = jax.random.fold_in(key, 3 + cycle), settings.pretrain.flow_steps
        loss = partial(loss_fn, caption_noise=caption_noise)
        name = f"flow model {cycle + 1}/{len(noises)}"
        trained = fit(loss, trained.params, draws, steps, 2e-3, name, watch=watch)
    return trained


def fresh_flow(parts: Parts, key: Array, latent: tuple[int, ...], text: Captions) -> PyTree:
    """Random transformer and text encoders."""
    c, keys = parts.transformer, jax.random.split(key, 3)
    tokens, pooled = jnp.zeros((1, 2, c.joint_attention_dim)), jnp.zeros((1, c.pooled_projection_dim))
    transformer = MMDiT(c).init(keys[0], jnp.zeros((1, *latent)), jnp.ones(1), tokens, pooled)["params"]
    return {
        "transformer": quiet_start(transformer, c.num_attention_heads, c.attention_head_dim),
        "text_encoder": CLIPText(parts.text).init(keys[1], text.ids[:1])["params"],
        "text_encoder_2": CLIPText(parts.text_2).init(keys[2], text.ids_2[:1])["params"],
    }


def tokenizers(folder: Path) -> tuple[dict[str, dict[str, str]], tuple[Any, Any]]:
    """The files of both tokenizers (written, too) and the tokenizers; as in SD3, the second pads with "!"."""
    files = {
        "tokenizer": vocabulary.files(grammar.WORDS, vocabulary.END),
        "tokenizer_2": vocabulary.files(grammar.WORDS, "!"),
    }
    for name, contents in files.items():
        for file, text in contents.items():
            write_text(folder / name / file, text)
    return files, (load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "tokenizer_2"))


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


def show(folder: Path) -> None:
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
    wanted = (grammar.splits()["heldout"] * 20)[:480]
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
