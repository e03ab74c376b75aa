"""The T5 encoder against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.models import attention, t5
from smart_grpo_jax.models.t5 import T5Config, T5Encoder

TINY = dict(
    vocab_size=50, d_model=20, d_kv=6, d_ff=28, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=12, relative_attention_max_distance=20, layer_norm_epsilon=1e-6,
    decoder_start_token_id=0, tie_word_embeddings=False, is_encoder_decoder=True, model_type="t5",
    output_past=True, task_specific_params={"a": 1}, n_positions=512, num_decoder_layers=2,
)  # fmt: skip

XXL = dict(
    d_model=4096, d_kv=64, d_ff=10240, num_heads=64, num_layers=24, vocab_size=32128,
    feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_gated_act=True,
)  # fmt: skip

LEAVES = {
    "shared": ("shared.weight", False),
    "relative_attention_bias": (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False,
    ),
    "final_layer_norm/scale": ("encoder.final_layer_norm.weight", False),
    "block/layer_0/layer_norm/scale": ("encoder.block.{i}.layer.0.layer_norm.weight", False),
    "block/layer_1/layer_norm/scale": ("encoder.block.{i}.layer.1.layer_norm.weight", False),
    **{
        f"block/layer_0/SelfAttention/{n}/kernel": (
            f"encoder.block.{{i}}.layer.0.SelfAttention.{n}.weight", True,
        )
        for n in "qkvo"
    },
    **{
        f"block/layer_1/DenseReluDense/{n}/kernel": (
            f"encoder.block.{{i}}.layer.1.DenseReluDense.{n}.weight", True,
        )
        for n in ("wi", "wi_0", "wi_1", "wo")
    },
}  # fmt: skip


def shapes(config, length=2):
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), ids)["params"]


def converted(config, state):
    """The oracle's tensors in our tree, by a table of this file alone."""
    leaves = {}
    for path in flatten_dict(shapes(config), sep="/"):
        key, transposed = LEAVES[path]
        keys = [key.format(i=i) for i in range(config.num_layers)] if "{i}" in key else [key]
        parts = [state.tensor(k).T if transposed else state.tensor(k) for k in keys]
        leaves[path] = np.stack(parts) if "{i}" in key else parts[0]
    return unflatten_dict(leaves, sep="/")


def tiny_oracle(oracle, **change):
    """A random tiny encoder. Its queries are as small as those of a trained one, which knows no 1/√d."""
    import transformers

    data = TINY | change
    net = oracle.random(transformers.T5EncoderModel(transformers.T5Config(**data)))
    for block in net.encoder.block:
        block.layer[0].SelfAttention.q.weight.mul_(data["d_kv"] ** -0.5)
    config = T5Config.from_json(data)
    return net, config, converted(config, oracle.reader(net))


def theirs(oracle, net, ids):
    return net(oracle.torch(ids)).last_hidden_state


def ids_of(length, batch=2, vocab=50):
    ids = np.random.default_rng(length).integers(2, vocab, (batch, length))
    ids[0, length // 2 :] = 0  # padding is attended to like any token
    return ids


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 1),
        ({}, 37),
        ({"num_heads": 1, "d_kv": 4, "num_layers": 1}, 8),
        ({"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}, 300),
        ({"feed_forward_proj": "relu", "relative_attention_num_buckets": 7}, 23),
        ({"is_gated_act": False, "dense_act_fn": "gelu_new"}, 9),
        ({"layer_norm_epsilon": 0.1}, 9),
    ],
)
def test_the_last_states_equal_transformers(change, length, oracle):
    net, config, params = tiny_oracle(oracle, **change)
    ids = ids_of(length)
    ours = jax.jit(T5Encoder(config).apply)({"params": params}, ids)
    oracle.assert_close(ours, theirs(oracle, net, ids), 1e-5)


@pytest.mark.torch
def test_bfloat16_stays_within_what_bfloat16_can_hold(oracle):
    # Two percent: torch's own bfloat16 run is as far from float32 (0.7 to 1 % on networks of this size).
    net, config, params = tiny_oracle(oracle)
    ids = ids_of(37)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    ours = jax.jit(T5Encoder(config, jnp.bfloat16).apply)({"params": low}, ids)
    assert ours.dtype == jnp.bfloat16
    error = relative_error(ours.astype(jnp.float32), theirs(oracle, net, ids))
    assert 1e-4 < error <= 0.02


@pytest.mark.torch
@pytest.mark.parametrize("wrong", ["erf_gelu", "scaled_logits", "one_directional", "mean_norm", "no_gate"])
def test_the_comparison_would_see_the_usual_mistakes(wrong, oracle, monkeypatch):
    # Ten times the tolerance of the parity test: the two GELUs differ least, by 2.6e-4 of the output.
    net, config, params = tiny_oracle(oracle)
    ids = ids_of(37)
    right, attend = t5.buckets, t5.attend
    if wrong == "erf_gelu":
        monkeypatch.setitem(t5.ACTIVATIONS, "gelu_new", lambda x: jax.nn.gelu(x, approximate=False))
    elif wrong == "scaled_logits":
        monkeypatch.setattr(t5, "attend", lambda *a, scale: attend(*a))
    elif wrong == "one_directional":
        monkeypatch.setattr(t5, "buckets", lambda *a: np.tril(right(*a)))
    elif wrong == "mean_norm":
        norm = t5.RMSNorm.__call__
        monkeypatch.setattr(t5.RMSNorm, "__call__", lambda self, x: norm(self, x - x.mean(-1, keepdims=True)))
    else:
        config = dataclasses.replace(config, is_gated_act=False)
        dense = params["block"]["layer_1"]["DenseReluDense"]
        dense["wi"] = dense.pop("wi_0")
        del dense["wi_1"]
    ours = T5Encoder(config).apply({"params": params}, ids)
    assert relative_error(ours, theirs(oracle, net, ids)) > 1e-4


@pytest.mark.torch
@pytest.mark.parametrize(("count", "distance"), [(32, 128), (12, 20), (7, 9), (4, 2), (64, 600), (33, 100)])
def test_buckets_equal_transformers_up_to_600_tokens(count, distance):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    want = T5Attention._relative_position_bucket(relative, True, count, distance)
    np.testing.assert_array_equal(t5.buckets(600, count, distance), want.numpy())


@pytest.mark.parametrize("implementation", sorted(attention.IMPLEMENTATIONS.keys() - attention.NEEDS.keys()))
def test_a_scale_of_one_leaves_the_logits_as_they_are(implementation):
    q, k, v = (jax.random.normal(key, (2, 5, 3, 4)) for key in jax.random.split(jax.random.key(0), 3))
    weights = jax.nn.softmax(jnp.einsum("bshd,bthd->bhst", q, k), -1)
    want = jnp.einsum("bhst,bthd->bshd", weights, v)
    got = attention.attend(q, k, v, implementation=implementation, scale=1.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    halved = attention.attend(q, k, v, implementation=implementation)
    np.testing.assert_allclose(attention.attend(q, k, v, scale=0.5), halved, rtol=1e-5, atol=1e-6)


def test_the_published_size_has_as_many_parameters_as_the_published_file():
    config = T5Config.from_json(XXL)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(config))) == 4_762_310_656
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    out = jax.eval_shape(T5Encoder(config, jnp.bfloat16).apply, {"params": shapes(config)}, ids)
    assert out.shape == (1, 512, 4096) and out.dtype == jnp.bfloat16


def test_omitted_entries_take_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    want = transformers.T5Config()
    for field in dataclasses.fields(T5Config):
        assert getattr(T5Config.from_json({}), field.name) == getattr(want, field.name), field.name


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"feed_forward_proj": "gated-gelu"},
        {"dense_act_fn": "gelu_new", "is_gated_act": True},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"},
    ],
)
def test_the_feed_forward_is_the_one_that_transformers_would_build(data):
    transformers = pytest.importorskip("transformers")
    want, got = transformers.T5Config(**data), T5Config.from_json(data)
    assert (got.dense_act_fn, got.is_gated_act) == (want.dense_act_fn, want.is_gated_act)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"feed_forward_proj": "gated-gelu_new"}, "feed_forward_proj"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn"),
        ({"model_type": "umt5"}, "model_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"relative_attention_num_buckets": 3}, "num_buckets"),
        ({"relative_attention_max_distance": 3}, "max_distance"),
    ],
)
def test_a_feature_that_is_not_built_is_refused(change, match):
    T5Config.from_json(TINY)
    with pytest.raises(UserError, match=match):
        T5Config.from_json(TINY | change)
