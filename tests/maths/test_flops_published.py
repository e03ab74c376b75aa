"""The counter against analytic counts of the published networks, on shapes alone.

The numbers were counted operator by operator from the PyTorch models on the meta device, and by hand for the
blocks: linears 24·D²·(I+T), joint attention 4·D·(I+T)², two operations per multiply-add.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from smart_grpo_jax.hub import abstract
from smart_grpo_jax.hub.families import NETWORKS
from smart_grpo_jax.maths import flops
from smart_grpo_jax.models.clip import CLIPText
from smart_grpo_jax.models.presets import preset
from smart_grpo_jax.models.t5 import T5Encoder

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LARGE = "stabilityai/stable-diffusion-3.5-large"
DEV = "black-forest-labs/FLUX.1-dev"

TOLERANCE = 0.02
"""Both counts leave out norms, activations and softmax; they differ in small projections and the like."""


def number(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@functools.cache
def pipeline(path, tokens):
    return abstract.pipeline(path, "bfloat16", tokens)


def inputs(pipe, path, pixels, tokens):
    return number(1, *pipe.latent_shape(pixels)), number(1), abstract.conditioning(path, tokens, 1)


@pytest.mark.parametrize(
    ("path", "pixels", "tokens", "teraflops"),
    [
        (MEDIUM, 512, 256, 2.443), (MEDIUM, 1024, 256, 11.250), (MEDIUM, 512, 128, 2.224),
        (MEDIUM, 1024, 128, 10.915), (LARGE, 512, 256, 7.978), (LARGE, 1024, 256, 31.121),
        (DEV, 512, 512, 21.503), (DEV, 1024, 512, 74.385), (DEV, 512, 256, 17.686), (DEV, 1024, 256, 69.467),
    ],
)  # fmt: skip
def test_a_velocity_costs_what_the_published_network_costs(path, pixels, tokens, teraflops):
    pipe = pipeline(path, tokens)
    velocity = pipe.velocity_fn()
    one_call = lambda p, x, t, cond: velocity({"params": p}, x, t, cond, jnp.ones(1))
    counted = flops.count(one_call, pipe.params["transformer"], *inputs(pipe, path, pixels, tokens))
    assert counted / 1e12 == pytest.approx(teraflops, rel=TOLERANCE)


@pytest.mark.parametrize(("pixels", "teraflops"), [(512, 2.515), (1024, 10.472)])
def test_a_decode_costs_what_the_published_decoder_costs(pixels, teraflops):
    pipe = pipeline(MEDIUM, 256)
    x = number(1, *pipe.latent_shape(pixels))
    counted = flops.count(pipe.decode_fn(), pipe.params["vae"], x)
    assert counted / 1e12 == pytest.approx(teraflops, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("part", "network", "tokens", "teraflops"),
    [
        ("text_encoder", CLIPText, 77, 0.0131), ("text_encoder_2", CLIPText, 77, 0.098),
        ("text_encoder_3", T5Encoder, 256, 2.40), ("text_encoder_3", T5Encoder, 512, 4.84),
    ],
)  # fmt: skip
def test_a_prompt_costs_what_the_published_encoders_cost(part, network, tokens, teraflops):
    config = preset("sd35-medium")[part]
    name = "T5EncoderModel" if network is T5Encoder else "CLIPTextModelWithProjection"
    params, ids = NETWORKS[name].table.abstract(config), jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    counted = flops.count(lambda p, ids: network(config).apply({"params": p}, ids), params, ids)
    assert counted / 1e12 == pytest.approx(teraflops, rel=TOLERANCE)


@pytest.mark.parametrize(("remat", "teraflops"), [("none", 5.29), ("dots", 5.61), ("full", 7.14)])
def test_a_gradient_of_adapters_costs_what_its_rematerialisation_says(remat, teraflops):
    """Counted once on a plain network of the same size with rank 32 on the joint attention of both streams:
    forward 2.46, so that the gradient is 2.15 times the forward pass: the base has no weight gradients."""
    pipe = pipeline(MEDIUM, 256)
    net, _, *example = pipe.adapter(32, 64)
    adapters = jax.eval_shape(net.init, jax.random.key(0), *example)["lora"]
    velocity = pipe.velocity_fn(32, 64, remat=remat)
    x, t, cond = inputs(pipe, MEDIUM, 512, 256)

    def loss(lora, params, x, t, cond):
        return velocity({"params": params, "lora": lora}, x, t, cond).sum()

    counted = flops.count(jax.grad(loss), adapters, pipe.params["transformer"], x, t, cond)
    # adapters of 14.1 M parameters there, of 18.8 M here
    assert counted / 1e12 == pytest.approx(teraflops, rel=0.03)


HEADS, TOKENS, WIDTH, BLOCK = 4, 1024, 64, 256
ATTENTION = 4 * HEADS * TOKENS**2 * WIDTH
"""q kᵀ and its product with v."""


def attend(fused):
    once = {name: BLOCK for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")}
    twice = {} if fused else {name: BLOCK for name in ("block_q_dq", "block_kv_dq")}
    sizes = splash.BlockSizes(**once, **twice, use_fused_bwd_kernel=fused)
    mask = splash.MultiHeadMask([splash.FullMask((TOKENS, TOKENS))] * HEADS)
    return lambda q, k, v: splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)(
        q, k, v
    )


ARRAYS = [jax.ShapeDtypeStruct((HEADS, TOKENS, WIDTH), jnp.bfloat16)] * 3


def test_splash_attention_costs_its_two_products():
    """The products lie in a scan inside a branch inside the kernel, once per cell of its grid."""
    assert flops.count(attend(fused=False), *ARRAYS) == ATTENTION


@pytest.mark.parametrize(("fused", "times"), [(True, 2.5), (False, 3.5)])
def test_the_gradient_of_splash_attention_costs_its_products(fused, times):
    """Backward: logits again, then dv, dp, dk, dq: 5 products for the 2 of the forward pass. In two kernels
    logits and dp are made twice: 7."""
    loss = lambda *a: attend(fused)(*a).astype(jnp.float32).sum()
    counted = flops.count(jax.grad(loss, argnums=(0, 1, 2)), *ARRAYS)
    # the row sums of do ∘ o are a product as well, of one part in 2 · TOKENS
    np.testing.assert_allclose(counted / ATTENTION, 1 + times, rtol=1e-3)
