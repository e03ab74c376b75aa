"""The configuration of a run.

A config file is a Python file whose `get_config()` returns `default()` with some values changed. It is
converted once, at the door, by `from_dict`: field by field against the bounds written here beside each
default, then against the contradictions between fields. Nothing below the entry point sees a ConfigDict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from smart_grpo_jax.core import contradictions, schema
from smart_grpo_jax.core.schema import option, section


@dataclasses.dataclass(frozen=True)
class Model:
    """Which pipeline is trained."""

    path: str = option("shapes", "a diffusers folder, a hub id in the local cache, or `shapes`")
    resolution: int = option(0, "image side in pixels; 0 is the model's own", low=0)
    dtype: str = option("float32", "compute type of the networks", choices=("float32", "bfloat16"))
    t5_length: int = option(256, "T5 tokens per prompt (256: diffusers; 128: Flow-GRPO)", low=1, high=512)
    tiling: bool = option(False, "decode large images in overlapping tiles: less memory, other pixels")
    attention: str = option(
        "auto",
        "attention of the transformer; auto: splash on a TPU, cudnn on a GPU with bfloat16, else xla",
        choices=("auto", "xla", "chunked", "cudnn", "splash"),
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trainable."""

    kind: str = option("lora", "low-rank adapter, or all transformer weights", choices=("lora", "full"))
    rank: int = option(32, "rank of the adapter", low=1)
    alpha: float = option(64.0, "adapter scale is alpha / rank", above=0)
    targets: tuple[str, ...] = option((), "module patterns; empty: the published list")
    init: str = option("", "LoRA file or folder to start from (diffusers, peft, flow_grpo)")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is drawn in an epoch: `groups` prompts, `members` images of each."""

    source: str = option(
        "shapes:train", "`shapes:train`, `geneval:train`, `tfds:NAME:SPLIT:FIELD`, a text file or JSONL"
    )
    strict: bool = option(False, "refuse a prompt file with a bad line; else bad lines are skipped, aloud")
    groups: int = option(48, "prompts per epoch", low=1)
    members: int = option(24, "images per prompt", low=2)
    negative: str = option("", "negative prompt of guidance")
    cache: str = option(
        "auto", "folder of prompt embeddings; auto: the user's cache, but none for `shapes`; off: memory only"
    )
    same_latent: bool = option(False, "all members of a group start from the same noise")


@dataclasses.dataclass(frozen=True)
class Window:
    """Which steps are noisy and trained; elsewhere the sampler is the plain ODE."""

    kind: str = option("all", "choice of steps", choices=("all", "fraction", "fixed", "random", "sliding"))
    fraction: float = option(1.0, "fraction: first part of the steps", above=0, high=1)
    start: int = option(0, "fixed, random: first step", low=0)
    stop: int = option(0, "random: end of the range (0: all but the last)", low=0)
    size: int = option(3, "fixed, random, sliding: steps in the window", low=1)
    stride: int = option(1, "sliding: steps to advance", low=1)
    every: int = option(25, "sliding: epochs between advances", low=1)
    noise_last: bool = option(False, "all: the last step is noisy too (July 2025 behaviour)")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a latent is drawn."""

    steps: int = option(10, "denoising steps of a rollout", low=2, high=1000)
    eval_steps: int = option(40, "ODE steps of an evaluation", low=1, high=1000)
    guidance: float = option(4.5, "classifier-free guidance of the policy; 1 is off", low=0)
    eval_guidance: float = option(4.5, "guidance of an evaluation", low=0)
    schedule: str = option(
        "model", "time grid; model: the pipeline's own", choices=("model", "sd3", "linspace", "flux")
    )
    shift: float = option(0.0, "shift of the time grid; 0 is the model's own", low=0)
    transition: str = option("flow", "stochastic step", choices=("ode", "flow", "dance", "cps"))
    noise_level: float = option(0.7, "a of Flow-SDE and CPS, eta of Dance", low=0, high=2)
    window: Window = section(Window)


@dataclasses.dataclass(frozen=True)
class Search:
    """Cross-entropy search over the noise of chosen steps; `rounds = 0` is Flow-GRPO."""

    rounds: int = option(5, "N, rounds of the search; 0: off", low=0)
    candidates: int = option(5, "K, candidates per round", low=1)
    elite: float = option(0.5, "P, share of the candidates kept in a round", above=0, high=1)
    space: str = option("transition", "where candidates are judged", choices=("transition", "latent"))
    returns: str = option("mean", "noise that is executed", choices=("mean", "sample", "best"))
    select: str = option("greedy", "elite rule", choices=("greedy", "random"))
    combine: str = option(
        "sum",
        "how several rewards order the candidates of a state: weighted sum of values, z-scores or ranks",
        choices=("sum", "zscore", "rank"),
    )
    noise_norm: str = option(
        "none", "rms rescales the returned noise to unit length", choices=("none", "rms")
    )
    sigma_floor: float = option(0.0, "least std of the search law", low=0, high=1)
    smoothing: float = option(1.0, "weight of the new mean and std (1: paper)", above=0, high=1)
    lookahead: int = option(
        1,
        "network calls that forecast a candidate's image: 1 is the one-step decode, more are Euler steps",
        low=1,
    )
    forecast: str = option(
        "policy",
        "who forecasts a candidate's image: the policy, or the model before training",
        choices=("policy", "base"),
    )
    antithetic: bool = option(False, "candidates in pairs of opposite noise")
    steps: str | tuple[int, ...] = option(
        "late",
        "searched steps: late, early, all, none, a list of indices, a..b (those that begin at a < t ≤ b, or "
        "the nearest), or auto (the window that an audit of the rewards recommends: docs/audit.md)",
    )
    members: float = option(1.0, "share of each group that is searched", low=0, high=1)
    credit: str = option(
        "none",
        "who gets the gain of the search",
        choices=("none", "offset", "split", "local", "difference"),
    )
    offset: float = option(1.0, "constant of credit = offset", low=0)
    until: int = option(0, "epochs with the search, plain noise after them; 0: all", low=0)
    execute: str = option(
        "search",
        "what the rollout executes: the search's noise, or plain noise",
        choices=("search", "random"),
    )
    guidance: float = option(-1.0, "guidance inside the search; -1: the sampler's", low=-1)
    chunk: int = option(0, "states searched at once; 0: all; auto: as many as fit", low=0, auto=-1)


@dataclasses.dataclass(frozen=True)
class Ema:
    """Average of the trained weights, used by evaluation and export."""

    decay: float = option(0.9, "largest decay; 0: no average", low=0, high=0.99999)
    every: int = option(8, "optimizer steps between two averages", low=1)


@dataclasses.dataclass(frozen=True)
class Train:
    """How the policy learns."""

    epochs: int = option(100, "epochs of the run", low=0)
    learning_rate: float = option(3e-4, "AdamW", above=0, high=1)
    weight_decay: float = option(1e-4, "AdamW", low=0)
    beta2: float = option(0.999, "AdamW", above=0, high=0.999999)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    warmup: int = option(0, "optimizer steps of linear warm-up", low=0)
    half_life: float = option(0.0, "epochs in which the learning rate halves; 0: it stays", low=0)
    updates_per_epoch: int = option(2, "optimizer steps per pass over an epoch's images", low=1)
    inner_epochs: int = option(1, "passes over an epoch's images", low=1)
    loss: str = option("ppo", "policy loss", choices=("ppo", "guard", "nft", "awm"))
    log_prob: str = option("gaussian", "density of a step", choices=("gaussian", "unnormalised"))
    clip: float = option(0.0, "ratio clip; 0: as published for the loss (ppo 1e-4, guard 2e-6, awm 1)", low=0)
    adv_clip: float = option(5.0, "advantage clip", above=0)
    adv_scope: str = option("global", "std of the advantages", choices=("global", "group"))
    adv_combine: str = option(
        "sum", "rewards are summed, or normalised one by one and then summed", choices=("sum", "normalise")
    )
    kl: str = option("flow_grpo", "form of the KL term", choices=("flow_grpo", "exact", "velocity"))
    kl_weight: float = option(0.0, "weight of the KL term", low=0)
    step_weight: str = option("uniform", "weight of a step", choices=("uniform", "tempflow", "guard"))
    actor: str = option(
        "raw", "weights that make an epoch's images: the newest, or their average", choices=("raw", "ema")
    )
    nft_beta: float = option(1.0, "beta of NFT", above=0, high=1)
    awm_weight: str = option("ghuber", "weight of AWM", choices=("uniform", "t", "t2", "huber", "ghuber"))
    check_rewards: bool = option(
        True,
        "before the first epoch, refuse a reward that is constant, prompt-blind, NaN or off its examples",
    )
    ema: Ema = section(Ema)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices: data x fsdp x tensor."""

    data: int = option(0, "copies of the model; 0: all remaining devices", low=0)
    fsdp: int = option(1, "devices that share one copy; auto: as few as its size needs", low=1, auto=0)
    tensor: int = option(1, "devices that share one layer", low=1)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Batch of one call of each kind; 0: all at once; auto: as many as fit a device (docs/plan.md)."""

    rollout: int = option(0, "prompt groups per rollout call", low=0, auto=-1)
    decode: int = option(0, "latents per decode", low=0, auto=-1)
    reward: int = option(0, "images per reward call", low=0, auto=-1)
    train: int = option(0, "states per gradient call", low=0, auto=-1)
    remat: str = option("none", "what the backward pass recomputes", choices=("none", "dots", "full"))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is kept."""

    every: int = option(10, "epochs between checkpoints", low=1)
    keep: int = option(3, "newest checkpoints kept, besides the best", low=1)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation of the bare policy: ODE, EMA weights, fixed noise per prompt and seed."""

    every: int = option(10, "epochs between evaluations; 0: only first and last", low=0)
    source: str = option(
        "shapes:heldout",
        "prompts: `shapes:heldout`, `shapes:combinations`, `geneval:eval`, a file …",
    )
    prompts: int = option(240, "number of prompts; 0: all", low=0)
    seeds: int = option(1, "images per prompt", low=1)
    weights: str = option("ema", "weights that are evaluated", choices=("ema", "raw"))
    search: bool = option(False, "search the noise at sampling time, too")


@dataclasses.dataclass(frozen=True)
class Log:
    """What is written."""

    tensorboard: bool = option(True, "TensorBoard events beside metrics.jsonl")
    every: int = option(1, "epochs between lines", low=1)
    samples: int = option(24, "prompts of the sample grid", low=1, high=256)
    deadline: float = option(0.0, "seconds a phase may last before the run ends with 75; 0: no limit", low=0)
    silence: float = option(
        60.0, "seconds without a sign of life of another process before all end with 75", above=0, high=300
    )
    lag: float = option(
        1800.0, "seconds a process may keep the others waiting before all end with 75; 0: no limit", low=0
    )


@dataclasses.dataclass(frozen=True)
class Host:
    """Rewards outside the graph: Python functions and servers, which score finished images. A reward may set
    all but the last two for itself."""

    batch: int = option(16, "images in one call or request", low=1)
    workers: int = option(4, "calls or requests of a reward at the same time", low=1, high=256)
    timeout: float = option(60.0, "seconds for one call or request", above=0)
    deadline: float = option(180.0, "seconds for one batch with all its attempts", above=0)
    retries: int = option(5, "further attempts after a request that failed", low=0)
    ahead: int = option(2, "rollout calls that may wait for their scores while the next one runs", low=1)
    failed_share: float = option(
        0.5, "share of images without a reward, of whatever kind, that ends the run with 5", above=0, high=1
    )


@dataclasses.dataclass(frozen=True)
class Audit:
    """Measuring at which steps the search pays: `--mode=rewards --audit`, and `search.steps = auto`."""

    prompts: int = option(32, "prompt groups that are looked at", low=2)
    members: int = option(8, "images per prompt", low=3)
    window: int = option(3, "most steps that are recommended", low=1)


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Making an embedded world's pipeline, or its learned rewards, from nothing."""

    part: str = option("pipeline", "what is made", choices=("pipeline", "rewards"))
    images: int = option(49152, "scenes rendered for the flow model", low=64)
    vae_steps: int = option(1400, "optimizer steps of the autoencoder", low=1)
    decoder_steps: int = option(2500, "optimizer steps of the decoder alone", low=1)
    flow_steps: tuple[int, ...] = option((7000, 6500), "optimizer steps of the flow model, per cosine cycle")
    batch: int = option(64, "images per step", low=1)
    caption_noise: tuple[float, ...] = option(
        (0.3, 0.1), "share of wrong captions, the head-room of RL: one cosine cycle of the flow model each"
    )
    dropout: float = option(0.1, "share of empty captions, for guidance", low=0, high=1)
    reward_pairs: int = option(20480, "pairs of pictures that the learned rewards are taught with", low=64)
    reward_steps: int = option(2500, "optimizer steps of each learned reward", low=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = option(0, "the root of all randomness", low=0, high=2**31 - 1)
    model: Model = section(Model)
    adapter: Adapter = section(Adapter)
    prompts: Prompts = section(Prompts)
    sampler: Sampler = section(Sampler)
    search: Search = section(Search)
    rewards: dict[str, Any] = option({"shapes": 1.0}, "training reward: name = weight, or a table of options")
    search_reward: dict[str, Any] = option({}, "reward of the search; empty: the training reward")
    eval_rewards: dict[str, Any] = option(
        {"shapes": 1.0, "shapes_aesthetic": 0.0}, "logged, never trained on"
    )
    host: Host = section(Host)
    train: Train = section(Train)
    mesh: Mesh = section(Mesh)
    memory: Memory = section(Memory)
    checkpoint: Checkpoint = section(Checkpoint)
    eval: Eval = section(Eval)
    log: Log = section(Log)
    audit: Audit = section(Audit)
    pretrain: Pretrain = section(Pretrain)


def default() -> ConfigDict:
    """All defaults as a ConfigDict that a config file edits."""
    return ConfigDict(schema.to_dict(Config()), type_safe=False)


def from_dict(values: Mapping[str, Any] | ConfigDict) -> Config:
    """The checked config; every mistake is one UserError that names field, value and what is wanted."""
    plain = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    config = schema.build(Config, plain)
    contradictions.check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The nested plain dict that config.json holds."""
    return schema.to_dict(config)


def override(values: ConfigDict, name: str, text: str) -> None:
    """Apply one `--config.a.b=text` in place."""
    schema.override(Config, values, name, text)


def searched_steps(config: Config) -> bool:
    """Whether the search is on at all."""
    return config.search.rounds > 0 and config.search.steps != "none" and config.search.members > 0
