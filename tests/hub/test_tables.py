"""Weight-name tables: strict, and the same in both directions."""

import jax
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import tables, weights
from smart_grpo_jax.models.presets import preset

TABLES = {
    "transformer": weights.MMDIT,
    "vae": weights.VAE,
    "text_encoder": weights.CLIP_TEXT,
    "text_encoder_2": weights.CLIP_TEXT,
}


class Reader(dict):
    def shape(self, key):
        return self[key].shape

    def tensor(self, key):
        return self[key]

    def file(self, key):
        return "some.safetensors"

    def keys(self):
        return set(super().keys())


def parts(name):
    table, config = TABLES[name], preset("tiny")[name]
    rng = np.random.default_rng(0)
    return (
        table,
        config,
        jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), table.abstract(config)),
    )


@pytest.mark.parametrize("name", TABLES)
def test_writing_and_reading_give_back_every_parameter(name):
    table, config, params = parts(name)
    tensors = tables.to_tensors(table, config, params)
    again = tables.to_params(table, config, Reader(tensors))
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.torch
def test_keys_and_shapes_are_those_of_the_published_classes(oracle):
    import diffusers
    import transformers

    from smart_grpo_jax.models.presets import TINY

    classes = {
        "transformer": diffusers.SD3Transformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": lambda **c: transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**c)
        ),
    }
    for name, build in classes.items():
        table, config, params = parts(name)
        ours = {k: v.shape for k, v in tables.to_tensors(table, config, params).items()}
        state = oracle.reader(build(**TINY[name])).state
        theirs = {table.canonical(k): v.shape for k, v in state.items()}
        assert ours == {k: v for k, v in theirs.items() if not k.endswith("position_ids")}


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named_with_their_file(name):
    table, config, params = parts(name)
    tensors = tables.to_tensors(table, config, params)
    key = sorted(tensors)[len(tensors) // 2]
    with pytest.raises(UserError, match=f"some.safetensors.*{key}.*1 missing"):
        tables.to_params(table, config, Reader({k: v for k, v in tensors.items() if k != key}))
    with pytest.raises(UserError, match=r"some.safetensors.*'surplus.weight'"):
        tables.to_params(table, config, Reader(tensors | {"surplus.weight": np.zeros(3)}))
    with pytest.raises(UserError, match=f"some.safetensors.*{key}.*shape"):
        tables.to_params(table, config, Reader(tensors | {key: np.zeros((2, 3, 5))}))


def test_old_names_are_accepted():
    table, config, params = parts("vae")
    tensors = tables.to_tensors(table, config, params)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v for k, v in tensors.items()}
    assert any("proj_attn" in k for k in tensors)
    jax.tree.map(np.testing.assert_array_equal, params, tables.to_params(table, config, Reader(tensors)))
    table, config, params = parts("text_encoder")
    flat = {k.removeprefix("text_model."): v for k, v in tables.to_tensors(table, config, params).items()}
    flat["embeddings.position_ids"] = np.arange(14)[None]
    jax.tree.map(np.testing.assert_array_equal, params, tables.to_params(table, config, Reader(flat)))


def test_parameters_that_do_not_fit_the_config_are_not_written():
    table, config, params = parts("vae")
    with pytest.raises(UserError, match="unknown 'surplus'"):
        tables.to_tensors(table, config, params | {"surplus": np.zeros(2)})
    with pytest.raises(UserError, match="lack"):
        tables.to_tensors(table, config, {"encoder": params["encoder"]})


def test_a_leaf_has_the_dtype_and_the_place_that_are_asked_for():
    table, config, params = parts("text_encoder")
    reader = Reader(tables.to_tensors(table, config, params))
    asked, read = [], []
    tree = tables.to_params(
        table, config, reader, np.float16, sharding=lambda path: asked.append(path), progress=read.append
    )
    assert tree["encoder"]["layers"]["mlp"]["fc1"]["kernel"].shape == (2, 8, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float16)}
    assert "encoder/layers/mlp/fc1/kernel" in asked and len(asked) == len(jax.tree.leaves(params))
    assert sum(read) == sum(v.size for v in reader.values())


def test_integers_are_no_weights():
    table, config, params = parts("vae")
    tensors = tables.to_tensors(table, config, params)
    key = min(tensors)
    with pytest.raises(UserError, match=f"some.safetensors.*{key}.*int32"):
        tables.to_params(table, config, Reader(tensors | {key: tensors[key].astype(np.int32)}))
