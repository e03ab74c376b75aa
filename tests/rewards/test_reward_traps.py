"""Each known way to get a published reward wrong moves its score by more than parity allows.

A mistake is put back by a patch. Were the tolerance of the parity tests so loose that it lets one pass, the
test of that mistake would fail here.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_rewards as tiny

from smart_grpo_jax import load_reward
from smart_grpo_jax.hub import folder
from smart_grpo_jax.hub import reward_weights as names
from smart_grpo_jax.hub.fused import Fused
from smart_grpo_jax.models import blip, clip
from smart_grpo_jax.rewards import base, clip_family, clip_models, image_reward, preprocess
from smart_grpo_jax.rewards.preprocess import Pipeline

pytestmark = pytest.mark.torch

SIZE = (64, 71)
"""The crop rules differ here: 3 pixels to spare beside both towers' inputs."""

SMALL = "image_reward of small embeddings"
"""Trained embeddings are small beside what the layers add; there the eps of the first norms shows."""


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Reward → what loads it, PyTorch's float64 scores, and the tolerance of the parity tests."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    images, root = tiny.batch(*SIZE), tmp_path_factory.mktemp("traps")
    made, oracle, found = tiny.clips(root, torch), tiny.ImageRewardOracle(), {}
    for name in ("image_reward", SMALL):
        path = oracle.write(root / name)
        single, double = (oracle.parts(images, tiny.PROMPTS, double)[-1] for double in (False, True))
        tolerance = tiny.tolerance(single, double)
        found[name] = ("image_reward", str(path), {"vision_heads": 3}, double, tolerance)
        for value in oracle.vision.embeddings.parameters():
            value.requires_grad_(False).mul_(0.03)
    for name, (kind, where, options, scores) in tiny.ORIGINALS.items():
        single, double = scores(made, images, tiny.PROMPTS)
        found[name] = (kind, str(root / where), options, double, tiny.tolerance(single, double))
    return found


def error(check, **changes):
    """The largest distance to PyTorch's float64, of a reward that is loaded and traced anew."""
    kind, path, options, double, _ = check
    clip_models.encode.clear_cache()  # it is jitted once for all, and knows no patches
    scores = load_reward(kind, path, **(options | changes))(tiny.batch(*SIZE), tiny.PROMPTS)
    clip_models.encode.clear_cache()
    assert np.isfinite(scores).all()
    return tiny.gap(scores, double)


def erf_gelu(x):
    return 0.5 * x * (1 + jax.scipy.special.erf(x / np.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def vit_tanh(patch):
    patch.setitem(clip.ACTIVATIONS, "gelu", tanh_gelu)


def bert_tanh(patch):
    patch.setitem(clip.ACTIVATIONS, "gelu", erf_gelu)
    patch.setattr(jax.nn, "gelu", lambda x, approximate: tanh_gelu(x))


def gelu_for_quick_gelu(patch):
    """What a default of another kind does to a config that leaves `hidden_act` out."""
    patch.setitem(clip.ACTIVATIONS, "quick_gelu", clip.ACTIVATIONS["gelu"])


def quick_gelu_for_gelu(patch):
    patch.setitem(clip.ACTIVATIONS, "gelu", clip.ACTIVATIONS["quick_gelu"])


def vit_eps(patch):
    patch.setattr(image_reward, "ViTConfig", functools.partial(blip.ViTConfig, layer_norm_eps=1e-5))


def clip_config(patch, tower, **changes):
    """Read every CLIP's config with changes."""
    original = clip_models.read_clip

    def read(data):
        both = dict(zip(("text", "vision"), original(data), strict=True))
        both[tower] = dataclasses.replace(both[tower], **changes)
        return both["text"], both["vision"]

    patch.setattr(clip_models, "read_clip", read)


def tokenizer(change):
    """ImageReward's tokenizer with its ids and mask changed."""

    def apply(patch):
        original = image_reward.load_wordpiece

        def load(*arguments):
            inner = original(*arguments)
            return lambda prompts: change(*map(np.array, inner(prompts)))

        patch.setattr(image_reward, "load_wordpiece", load)

    return apply


def enc_first(ids, mask):
    ids[:, 0] = len(tiny.VOCAB) + 1
    return ids, mask


def norm(name, wrong):
    """Replace the LayerNorm of this name by `wrong(norm, x)`."""

    def apply(patch):
        original = blip.nn.LayerNorm

        def make(*arguments, **options):
            layer = original(*arguments, **options)
            return functools.partial(wrong, layer) if options.get("name") == name else layer

        patch.setattr(blip.nn, "LayerNorm", make)

    return apply


def token_types(patch):
    """A row that is added to every word, as BERT's token type 0 is."""
    row = 0.05 * np.random.default_rng(3).normal(size=32).astype(np.float32)
    original = image_reward.load

    def load(*arguments):
        loaded = original(*arguments)
        embeddings = loaded.params["text_encoder"]["embeddings"]
        embeddings["word_embeddings"] = embeddings["word_embeddings"] + row
        return loaded

    patch.setattr(image_reward, "load", load)


def causal(patch):
    original = blip.attend

    def attend(q, k, v, bias):
        if bias is not None and q.shape[1] == k.shape[1]:
            bias = bias + np.triu(np.full((q.shape[1], q.shape[1]), -1e9, np.float32), 1)
        return original(q, k, v, bias)

    patch.setattr(blip, "attend", attend)


def unclipped_pass(pixels, size, axis):
    """Pillow's integers without the clip to 0..255."""
    if pixels.shape[axis] == size:
        return pixels
    return jnp.round(preprocess.float_pass(pixels, size, axis))


def pipeline(name, wrong):
    """Another pipeline under this name, wherever it is looked up."""

    def apply(patch):
        patch.setitem(preprocess.PIPELINES, name, wrong)

    return apply


def set_to(place, name, value):
    return lambda patch: patch.setattr(place, name, value)


ONLY_FIRST = lambda layer, x: jnp.concatenate([layer(x)[:, :1], x[:, 1:]], 1)
LEFT_OUT = lambda layer, x: x + 0 * layer(x)
KQV = (Fused(r"(.*\.attn)\.in_proj_(weight|bias)", tuple(rf"\1.{n}_proj.\2" for n in "kqv")),)
HESSEL_BARE = (*clip_family.VARIANTS["hessel"][:2], "", clip_family.VARIANTS["hessel"][3])

TRAPS = {
    "tanh GELU in the ViT": ("image_reward", vit_tanh),
    "tanh GELU in BERT": ("image_reward", bert_tanh),
    "tanh GELU in CLIP-H": ("pick_score", vit_tanh),
    "quick_gelu where the config says gelu": ("pick_score", quick_gelu_for_gelu),
    "gelu where the config says nothing": ("clip_score", gelu_for_quick_gelu),
    "eps 1e-5 in the ViT": (SMALL, vit_eps),
    "eps 1e-6 in CLIP's image tower": ("pick_score", lambda p: clip_config(p, "vision", layer_norm_eps=1e-6)),
    "eps 1e-6 in CLIP's text tower": ("pick_score", lambda p: clip_config(p, "text", layer_norm_eps=1e-6)),
    "[ENC] in the place of [CLS]": ("image_reward", tokenizer(enc_first)),
    "40 tokens": ("image_reward", set_to(image_reward, "LENGTH", 40)),
    "30 tokens": ("image_reward", set_to(image_reward, "LENGTH", 30)),
    "no padding mask": ("image_reward", tokenizer(lambda ids, mask: (ids, np.ones_like(mask)))),
    "a causal BERT": ("image_reward", causal),
    "token types": ("image_reward", token_types),
    "BLIP's last norm on the first token alone": ("image_reward", norm("norm", ONLY_FIRST)),
    "no post_layernorm": ("clip_score", norm("post_layernorm", LEFT_OUT)),
    "no pre_layrnorm": ("clip_score", norm("pre_layrnorm", LEFT_OUT)),
    "no unit length before the aesthetic head": ("aesthetic", set_to(clip_models, "unit", lambda x: x)),
    "another head width": ("pick_score", lambda p: clip_config(p, "vision", num_attention_heads=4)),
    "the end token of an old config taken at its word": (
        "pick_score",
        set_to(clip, "end_positions", lambda ids, eos: jnp.argmax(ids == eos, -1)),
    ),
    "q, k, v in another order": ("hps", set_to(names, "OPEN_FUSED", KQV)),
    "no prefix in Hessel's variant": (
        "clip_score as Hessel", lambda p: p.setitem(clip_family.VARIANTS, "hessel", HESSEL_BARE)
    ),
    "no 8-bit rounding": ("image_reward", set_to(preprocess, "straight_round", lambda x: x)),
    "no clip of the overshoot": ("image_reward", set_to(preprocess, "eight_bit_pass", unclipped_pass)),
    "one rounding for two": ("pick_score", pipeline("clip", Pipeline("hf", "fast"))),
    "a clip that HPSv2 does not have": ("hps", pipeline("hps", Pipeline("tv", "fast"))),
    "the crop rule of transformers in ImageReward": (
        "image_reward", pipeline("image_reward", Pipeline("hf", "exact"))
    ),
    "the crop rule of torchvision in PickScore": ("pick_score", pipeline("clip", Pipeline("tv", "exact"))),
    "squashed, not cropped": ("clip_score", set_to(preprocess, "resized", lambda h, w, size: (size, size))),
}  # fmt: skip


@pytest.mark.parametrize("name", ["image_reward", SMALL, *tiny.ORIGINALS])
def test_without_a_mistake_the_score_is_within_the_tolerance(name, checks):
    assert error(checks[name]) <= checks[name][-1]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_known_mistake_is_outside_the_tolerance(trap, checks, monkeypatch):
    name, mistake = TRAPS[trap]
    mistake(monkeypatch)
    assert error(checks[name]) > checks[name][-1]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_wrong_number_of_heads_is_outside_the_tolerance(heads, checks):
    check = checks["image_reward"]
    assert error(check, vision_heads=heads) > check[-1]


def test_the_eps_of_bert_is_told_apart_where_the_variance_is_small():
    """1e-6 for 1e-12 moves a whole score by about its noise, so the layer itself is looked at."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y = (1e-3 * rng.normal(size=(2, 5, 32)) for _ in range(2))
    kernel = rng.normal(size=(32, 32)) / 32**0.5
    params = {
        "dense": {"kernel": kernel, "bias": np.zeros(32)},
        "LayerNorm": {"scale": np.ones(32), "bias": np.zeros(32)},
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def theirs(kind):
        tensors = [torch.from_numpy(a.astype(np.float32)).to(kind) for a in (x, y, kernel)]
        return torch.nn.functional.layer_norm(tensors[0] + tensors[1] @ tensors[2], (32,), eps=1e-12).numpy()

    def ours(eps):
        config = blip.BertConfig(hidden_size=32, num_attention_heads=4, layer_norm_eps=eps)
        return blip.Output(config, jnp.float32).apply(
            {"params": params}, *(jnp.asarray(a, jnp.float32) for a in (y, x))
        )

    single, double = theirs(torch.float32), theirs(torch.float64)
    assert tiny.gap(ours(1e-12), double) <= tiny.tolerance(single, double)
    assert tiny.gap(ours(1e-6), double) > 100 * tiny.tolerance(single, double)


def products(jaxpr):
    """(precision, operand types) of every matrix product and convolution of a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"], {str(v.aval.dtype) for v in equation.invars}
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def unprotected(check):
    """Products of float32 numbers that a TPU would round to bfloat16."""
    kind, path, options, *_ = check
    reward = base.build(kind, path, **options)
    ctx = reward.prepare(tiny.PROMPTS)
    program = jax.make_jaxpr(reward.score)(reward.params, tiny.batch(*SIZE), ctx)
    found = list(products(program.jaxpr))
    assert len(found) > 10
    highest = jax.lax.Precision.HIGHEST
    return [kinds for precision, kinds in found if precision not in (highest, (highest, highest))]


@pytest.mark.parametrize("name", ["image_reward", "pick_score", "hps", "aesthetic"])
def test_every_product_of_a_float32_reward_asks_for_float32(name, checks, monkeypatch):
    assert unprotected(checks[name]) == []
    monkeypatch.setattr(folder, "matmul_precision", lambda dtype: contextlib.nullcontext())
    assert unprotected(checks[name]) != []
