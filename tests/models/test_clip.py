"""The text encoders against transformers."""

import jax
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import tables, weights
from smart_grpo_jax.models.clip import CLIPConfig, CLIPText

CONFIGS = {
    "quick_gelu_projection_legacy_eos": dict(
        vocab_size=60, hidden_size=24, intermediate_size=40, projection_dim=10, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=11, hidden_act="quick_gelu", eos_token_id=2,
        architectures=["CLIPTextModelWithProjection"], bos_token_id=0, pad_token_id=1,
    ),
    "gelu_no_projection_first_eos": dict(
        vocab_size=50, hidden_size=16, intermediate_size=20, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=9, hidden_act="gelu", eos_token_id=31,
        architectures=["CLIPTextModel"], bos_token_id=0, pad_token_id=1,
    ),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_pooled_equal_transformers(name, oracle):
    import transformers

    config = CLIPConfig.from_json(CONFIGS[name])
    net = getattr(transformers, CONFIGS[name]["architectures"][0])(
        transformers.CLIPTextConfig(**CONFIGS[name])
    )
    net = oracle.random(net)
    params = tables.to_params(weights.CLIP_TEXT, config, oracle.reader(net))
    ids = np.random.default_rng(0).integers(3, 30, (3, config.max_position_embeddings))
    ids[:, 5:] = 31  # end tokens, padding included; legacy configs take the first largest id
    out = jax.jit(CLIPText(config).apply)({"params": params}, ids)
    theirs = net(oracle.torch(ids), output_hidden_states=True)
    pooled = theirs.text_embeds if config.projection else theirs.pooler_output
    oracle.assert_close(out.penultimate, theirs.hidden_states[-2], 1e-5)
    oracle.assert_close(out.last, theirs.last_hidden_state, 1e-5)
    oracle.assert_close(out.pooled, pooled, 1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"architectures": ["CLIPModel"]}, "CLIPModel"),
        ({"rope_theta": 1e4}, "rope_theta"),
    ],
)
def test_a_feature_that_is_not_built_is_refused(change, match):
    with pytest.raises(UserError, match=match):
        CLIPConfig.from_json(CONFIGS["gelu_no_projection_first_eos"] | change)
