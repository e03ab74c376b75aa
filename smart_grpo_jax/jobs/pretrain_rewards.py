"""Teach the embedded world's two learned rewards, small copies of the paper's, in their published layouts.

shapes_image_reward     ImageReward's network and code path: BLIP, ranked pairs, Bradley-Terry
                            loss = -log sigmoid(s(better) - s(worse))
shapes_aesthetic_clip   the aesthetic predictor's: a contrastive CLIP and five linear layers, fitted to the
                        closed form of rewards/shapes_aesthetic.py

The pairs are seen as rendered, through the autoencoder, and as one-step decodes of the world's own flow
model at random noise levels, because that is where the search asks. Everything follows from the seed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.types import Conditioning, PyTree
from smart_grpo_jax.hub import functions, reward_weights, safetensors, tables, torch_write
from smart_grpo_jax.hub import pipeline as hub
from smart_grpo_jax.hub.folder import write_json, write_text
from smart_grpo_jax.hub.fused import fuse
from smart_grpo_jax.hub.tokenizers import load_tokenizer
from smart_grpo_jax.hub.wordpiece import SPECIAL, load_wordpiece
from smart_grpo_jax.jobs.pretrain import Trained, fit
from smart_grpo_jax.maths import rng, transition
from smart_grpo_jax.models.blip import BLIP, BertConfig, BLIPConfig, ViTConfig
from smart_grpo_jax.models.clip import CLIPConfig, CLIPOutput, CLIPText
from smart_grpo_jax.models.clip_vision import CLIPVision, CLIPVisionConfig
from smart_grpo_jax.rewards import head, image_reward
from smart_grpo_jax.rewards.clip_models import unit
from smart_grpo_jax.rewards.preprocess import PIPELINES
from smart_grpo_jax.rewards.shapes_aesthetic import aesthetic
from smart_grpo_jax.runtime.progress import duration, say, table
from smart_grpo_jax.worlds.shapes import grammar, pairs, vocabulary
from smart_grpo_jax.worlds.shapes.scenes import SIZE

CHUNK = 512
"""Pairs made in one call."""

VIEWS = ("rendered", "through the autoencoder", "one-step decode")
VIEW_SHARES = (0.25, 0.25, 0.5)
HELD_OUT = 2048
"""Pairs that are never trained on: they set the scale, and the numbers of the report."""

BLIP_SIZES = BLIPConfig(
    ViTConfig(96, 192, 3, 3, image_size=SIZE, patch_size=8),
    BertConfig(64, 128, 2, 2, max_position_embeddings=image_reward.LENGTH, encoder_width=96),
)
HEAD_WIDTHS = (64, 32, 16, 8, 1)
"""Inner widths of both heads; the published ones are 1024, 128, 64, 16, 1."""

CLIP_SIZES = CLIPVisionConfig(64, 128, 32, 3, 2, image_size=SIZE, patch_size=8)
TEMPERATURE = 0.07
AESTHETIC_WEIGHT = 0.3


class Lessons(NamedTuple):
    """Pairs as 8-bit pictures, the row of their prompt, how they are seen and at which noise level."""

    better: UInt8[Array, "n 24 24 3"]
    worse: UInt8[Array, "n 24 24 3"]
    row: Int[Array, " n"]
    view: Int[Array, " n"]
    t: Float[Array, " n"]
    flawed: Array

    def rows(self, index: Any) -> Lessons:
        """Some of them."""
        return jax.tree.map(lambda a: a[index], self)


def texts() -> list[str]:
    """All prompts of the grammar, in a fixed order."""
    return [grammar.text(prompt) for prompt in grammar.all_prompts()]


def lessons(pipe: hub.Pipeline, key: Array, count: int, guidance: float) -> Lessons:
    """`count` valid pairs."""
    wanted = texts()
    place = {tuple(row): i for i, row in enumerate(grammar.encode(wanted).tolist())}
    cond = pipe.encode(wanted, compact=True)
    params = {
        "policy": {"params": pipe.params["transformer"], "negative": pipe.encode([""], compact=True)},
        "vae": pipe.params["vae"],
    }
    view = jax.jit(lambda params, key, drawn, cond: seen(pipe, params, key, drawn, cond, guidance))
    parts: list[Lessons] = []
    have, call, started = 0, 0, time.monotonic()
    while have < count:
        draw_key, view_key = jax.random.split(jax.random.fold_in(key, call))
        drawn = jax.jit(pairs.draw, static_argnums=1)(draw_key, CHUNK)
        row = np.asarray([place[tuple(spec)] for spec in np.asarray(drawn.spec).tolist()])
        better, worse, kind, t = view(params, view_key, drawn, cond.rows(jnp.asarray(row)))
        some = Lessons(better, worse, jnp.asarray(row, jnp.int32), kind, t, drawn.flawed)
        parts.append(jax.tree.map(np.asarray, some).rows(np.asarray(drawn.valid)))
        have, call = have + int(np.asarray(drawn.valid).sum()), call + 1
        if call % 10 == 0:
            left = (time.monotonic() - started) / have * (count - have)
            say(f"pairs {have}/{count} | ETA {max(left, 0):.0f} s")
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
    return jax.tree.map(jnp.asarray, joined)


def seen(
    pipe: hub.Pipeline, params: PyTree, key: Array, drawn: pairs.Pairs, cond: Conditioning, guidance: float
) -> tuple[Array, Array, Array, Array]:
    """Both pictures of each pair under one view, the same noise on both: (better, worse, view, t)."""
    view_key, time_key, noise_key = jax.random.split(key, 3)
    n = len(drawn.spec)
    view = jax.random.choice(view_key, len(VIEWS), (n,), p=jnp.asarray(VIEW_SHARES))
    t = jax.random.uniform(time_key, (n,), minval=0.02, maxval=1.0)
    noise = jax.random.normal(noise_key, (n, *pipe.latent_shape()))
    wide = t[:, None, None, None]
    policy = pipe.guided(pipe.velocity_fn(), guidance)

    def one(images: Array) -> Array:
        x0 = functions.encode_images_fn(pipe.vae)(params["vae"], images)
        x = (1 - wide) * x0 + wide * noise
        guess = transition.one_step(x, policy(params["policy"], x, t, cond), wide)
        decode = lambda z: pipe.decode_fn()(params["vae"], z)
        kind = view[:, None, None, None]
        drawn = jnp.select([kind == 0, kind == 1], [images, decode(x0)], decode(guess))
        return jnp.round(255 * drawn).astype(jnp.uint8)

    return one(drawn.better), one(drawn.worse), view, jnp.where(view == 2, t, 0.0)


def pixels(images: UInt8[Array, "n 24 24 3"], pipeline: str) -> Float[Array, "n 24 24 3"]:
    """What a tower reads."""
    return PIPELINES[pipeline](images.astype(jnp.float32) / 255, SIZE)


def fresh_head(key: Array, features: int) -> PyTree:
    """Five linear layers that start as a random map of unit gain."""
    layers, width = {}, features
    for layer, after in zip(reward_weights.HEAD_LAYERS, HEAD_WIDTHS, strict=True):
        draw = jax.random.normal(jax.random.fold_in(key, layer), (width, after)) / width**0.5
        layers[f"layers_{layer}"] = {"kernel": draw, "bias": jnp.zeros(after)}
        width = after
    return layers


def train_image_reward(
    config: BLIPConfig, lesson: Lessons, ids: Array, mask: Array, settings: Config
) -> Trained:
    """Bradley-Terry, with a weak pull of the scores to zero (only differences are ranked)."""
    net, batch = BLIP(config), settings.pretrain.batch
    key = jax.random.fold_in(rng.key(settings.seed, "pretrain"), 11)
    start = net.init(key, jnp.zeros((1, SIZE, SIZE, 3)), ids[:1], mask[:1])["params"]
    params = {"blip": start, "head": fresh_head(key, config.text.hidden_size)}

    def loss_fn(params: PyTree, key: Array, lesson: Lessons) -> Array:
        some = lesson.rows(jax.random.randint(key, (batch,), 0, len(lesson.row)))
        scores = ranked(net, params, jnp.concatenate([some.better, some.worse]), ids, mask, some.row)
        better, worse = jnp.split(scores, 2)
        return jax.nn.softplus(worse - better).mean() + 1e-3 * (scores**2).mean()

    steps = settings.pretrain.reward_steps
    return fit(loss_fn, params, jax.random.fold_in(key, 1), steps, 2e-3, "image reward", 1, data=(lesson,))


def ranked(net: BLIP, params: PyTree, images: Array, ids: Array, mask: Array, row: Array) -> Array:
    """Raw scores of 2 n pictures for n prompts."""
    row = jnp.tile(row, len(images) // len(row))
    state = net.apply({"params": params["blip"]}, pixels(images, "image_reward"), ids[row], mask[row])
    return head.layered(params["head"], cast(Array, state))


def train_clip(text: CLIPConfig, lesson: Lessons, ids: Array, settings: Config) -> Trained:
    """Contrast of pictures and prompts, and the aesthetic score of better and worse pictures alike."""
    tower, reader, batch = CLIPVision(CLIP_SIZES), CLIPText(text), settings.pretrain.batch
    key = jax.random.fold_in(rng.key(settings.seed, "pretrain"), 12)
    params = {
        "vision": tower.init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"],
        "text": reader.init(key, ids[:1])["params"],
        "head": fresh_head(key, CLIP_SIZES.projection_dim),
    }

    def loss_fn(params: PyTree, key: Array, lesson: Lessons) -> Array:
        some = lesson.rows(jax.random.randint(key, (batch,), 0, len(lesson.row)))
        images = jnp.concatenate([some.better, some.worse])
        image = unit(cast(Array, tower.apply({"params": params["vision"]}, pixels(images, "clip"))))
        prompt = unit(cast(CLIPOutput, reader.apply({"params": params["text"]}, ids[some.row])).pooled)
        logits = image[:batch] @ prompt.T / TEMPERATURE
        same = some.row[:, None] == some.row[None]
        logits = jnp.where(same & ~jnp.eye(batch, dtype=bool), -1e9, logits)
        contrast = -(jax.nn.log_softmax(logits, 0) + jax.nn.log_softmax(logits, 1)).diagonal().mean()
        wanted = aesthetic(images.astype(jnp.float32) / 255).value
        error = head.layered(params["head"], image) - (wanted - wanted_mean)
        return contrast + AESTHETIC_WEIGHT * (error**2).mean()

    wanted_mean = 5.0
    steps = settings.pretrain.reward_steps
    trained = fit(loss_fn, params, jax.random.fold_in(key, 1), steps, 2e-3, "clip", 1, data=(lesson,))
    last = f"layers_{reward_weights.HEAD_LAYERS[-1]}"
    layers = trained.params["head"]
    layers[last] = {**layers[last], "bias": layers[last]["bias"] + wanted_mean}
    return trained


def calibrated(layers: PyTree, raw: Float[np.ndarray, " n"]) -> PyTree:
    """The head rescaled so that its published constants make the held-out scores mean 0, std 1."""
    gain = image_reward.STD / raw.std()
    last = f"layers_{reward_weights.HEAD_LAYERS[-1]}"
    kernel, bias = layers[last]["kernel"], layers[last]["bias"]
    moved = {"kernel": kernel * gain, "bias": (bias - raw.mean()) * gain + image_reward.MEAN}
    return {**layers, last: moved}


def half(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float16: the files travel with the package."""
    return {key: np.asarray(tensor, np.float16) for key, tensor in tensors.items()}


def write_image_reward(folder: Path, config: BLIPConfig, params: PyTree, layers: PyTree) -> None:
    """ImageReward.pt and med_config.json."""
    tensors = tables.to_tensors(reward_weights.IMAGE_REWARD, config, params)
    blocks = [f"blip.visual_encoder.blocks.{i}.attn.qkv" for i in range(config.vision.num_hidden_layers)]
    fused = [f"{block}.{leaf}" for block in blocks for leaf in ("weight", "bias")]
    tensors = fuse(tensors, reward_weights.BLIP_FUSED, fused)
    widths = (config.text.hidden_size, *HEAD_WIDTHS)
    tensors |= tables.to_tensors(reward_weights.IMAGE_REWARD_HEAD, widths, layers)
    torch_write.write(folder / image_reward.FILE, half(tensors))
    text = config.text
    write_json(
        folder / image_reward.CONFIG,
        {
            "architectures": ["BertModel"],
            "hidden_act": "gelu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "layer_norm_eps": text.layer_norm_eps,
            "max_position_embeddings": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "encoder_width": text.encoder_width,
            "add_cross_attention": True,
            "vision_heads": config.vision.num_attention_heads,
        },
    )


def write_aesthetic(folder: Path, text: CLIPConfig, params: PyTree) -> None:
    """A CLIPModel folder, and the head beside it under its published keys."""
    vision = CLIP_SIZES
    tensors = tables.to_tensors(reward_weights.VISION, vision, params["vision"])
    tensors |= tables.to_tensors(reward_weights.TEXT, text, params["text"])
    tensors["logit_scale"] = np.asarray(np.log(1 / TEMPERATURE))
    safetensors.write(folder / "model.safetensors", half(tensors))
    parts = {"text_config": dataclasses.asdict(text), "vision_config": dataclasses.asdict(vision)}
    parts["text_config"].pop("projection")
    head_data = {"architectures": ["CLIPModel"], "model_type": "clip"}
    write_json(folder / "config.json", {**head_data, "projection_dim": vision.projection_dim, **parts})
    widths = (vision.projection_dim, *HEAD_WIDTHS)
    layers = tables.to_tensors(reward_weights.AESTHETIC_HEAD, widths, params["head"])
    torch_write.write(folder / "aesthetic-head.pth", half(layers))


def report(
    name: str, lesson: Lessons, better: Float[np.ndarray, " n"], worse: Float[np.ndarray, " n"]
) -> None:
    """Share of held-out pairs in the right order, by view, noise level and kind of mistake."""
    right = better > worse
    view, t, flawed = (np.asarray(a) for a in (lesson.view, lesson.t, lesson.flawed))
    rows: list[list[Any]] = [[label, right[view == i]] for i, label in enumerate(VIEWS)]
    for low in (0.0, 0.25, 0.5, 0.75):
        near = (view == 2) & (t > low) & (t <= low + 0.25)
        rows.append([f"one-step, t {low:g} to {low + 0.25:g}", right[near]])
    rows += [["wrong scene", right[~flawed]], ["badly drawn", right[flawed]]]
    cells = [[label, len(part), f"{part.mean():.3f}"] for label, part in rows if len(part)]
    say(table(cells, [f"{name}: held-out pairs", "number", "in the right order"]))


def job(config: Config, out: str, model: str = "shapes") -> None:
    """`--mode=pretrain --config.pretrain.part=rewards`: write both rewards below `out`."""
    started, root = time.time(), Path(out)
    pipe = hub.load_pipeline(model)
    key = jax.random.fold_in(rng.key(config.seed, "pretrain"), 10)
    count = config.pretrain.reward_pairs
    lesson = lessons(pipe, key, count + HELD_OUT, config.sampler.guidance)
    held, lesson = lesson.rows(slice(count, None)), lesson.rows(slice(count))
    blip_job(config, root / "image_reward", lesson, held)
    clip_job(config, root / "aesthetic", lesson, held)
    say(f"rewards in {root} after {duration(time.time() - started)}")


def blip_job(config: Config, folder: Path, lesson: Lessons, held: Lessons) -> None:
    """shapes_image_reward: train, calibrate, write, report."""
    write_text(folder / "vocab.txt", "\n".join([*SPECIAL, *grammar.WORDS]) + "\n")
    tokenizer = load_wordpiece(folder, image_reward.LENGTH)
    ids, mask = tokenizer(texts())
    longest = int(mask.sum(1).max())  # padding changes nothing but the time it takes
    ids, mask = jnp.asarray(ids[:, :longest]), jnp.asarray(mask[:, :longest])
    sizes = dataclasses.replace(
        BLIP_SIZES, text=dataclasses.replace(BLIP_SIZES.text, vocab_size=tokenizer.size)
    )
    trained = train_image_reward(sizes, lesson, ids, mask, config)
    both = jnp.concatenate([held.better, held.worse])
    score = jax.jit(ranked, static_argnums=0)
    raw = np.asarray(score(BLIP(sizes), trained.params, both, ids, mask, held.row))
    write_image_reward(folder, sizes, trained.params["blip"], calibrated(trained.params["head"], raw))
    report("shapes_image_reward", held, *np.split(raw, 2))


def clip_job(config: Config, folder: Path, lesson: Lessons, held: Lessons) -> None:
    """shapes_aesthetic_clip: train, write, report."""
    files = vocabulary.files(grammar.WORDS, vocabulary.END)
    for name, text in files.items():
        write_text(folder / name, text)
    words = len(json.loads(files["vocab.json"]))
    sizes = CLIPConfig(
        vocab_size=words,
        hidden_size=48,
        intermediate_size=96,
        projection_dim=CLIP_SIZES.projection_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=vocabulary.LENGTH,
        eos_token_id=words - 1,
    )
    ids = jnp.asarray(load_tokenizer(folder, vocabulary.LENGTH)(texts()))
    trained = train_clip(sizes, lesson, ids, config)
    write_aesthetic(folder, sizes, trained.params)
    fit_quality(trained.params, held)


def fit_quality(params: PyTree, held: Lessons) -> None:
    """How much of the closed form's variance the head explains on held-out pictures."""
    images = jnp.concatenate([held.better, held.worse])
    wanted = np.asarray(aesthetic(images.astype(jnp.float32) / 255).value)
    tower = jax.jit(lambda p, x: unit(cast(Array, CLIPVision(CLIP_SIZES).apply({"params": p}, x))))
    got = np.asarray(head.layered(params["head"], tower(params["vision"], pixels(images, "clip"))))
    rest = ((got - wanted) ** 2).mean() / wanted.var()
    say(f"shapes_aesthetic_clip: explains {1 - rest:.3f} of the variance of shapes_aesthetic (held out)")
