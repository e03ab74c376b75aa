"""The VAE against diffusers."""

import jax
import numpy as np
import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import tables, weights
from smart_grpo_jax.models import vae
from smart_grpo_jax.models.vae import AutoencoderKL, VAEConfig


def blocks(n):
    return {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}


CONFIGS = {
    "as_published": dict(
        block_out_channels=[8, 12, 16], layers_per_block=2, latent_channels=5, norm_num_groups=4,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        **blocks(3),
    ),
    "quant_convs_no_attention": dict(
        block_out_channels=[6, 9], layers_per_block=1, latent_channels=3, norm_num_groups=3,
        mid_block_add_attention=False, **blocks(2),
    ),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_both_directions_equal_diffusers(name, oracle):
    import diffusers

    config = VAEConfig.from_json(CONFIGS[name])
    net = oracle.random(diffusers.AutoencoderKL(**CONFIGS[name]))
    params = tables.to_params(weights.VAE, config, oracle.reader(net))
    model, f = AutoencoderKL(config), config.factor
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3 * f, 2 * f, 3)).astype(np.float32)
    mean, logvar = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    theirs = net.encode(oracle.torch(images).permute(0, 3, 1, 2)).latent_dist
    oracle.assert_close(mean, theirs.mean.permute(0, 2, 3, 1), 5e-5)  # float32 against float64: 2e-6 of max
    oracle.assert_close(logvar, theirs.logvar.permute(0, 2, 3, 1), 5e-5)
    ours = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, mean)
    oracle.assert_close(ours, net.decode(theirs.mean).sample.permute(0, 2, 3, 1), 5e-5)


def test_normalise_and_denormalise_are_inverse():
    config = VAEConfig.from_json(CONFIGS["as_published"])
    z = np.linspace(-3, 3, 10)
    np.testing.assert_allclose(vae.normalise(config, z), (z - 0.0609) * 1.5305)
    np.testing.assert_allclose(vae.denormalise(config, vae.normalise(config, z)), z, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]},
            "down_block",
        ),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"norm_num_groups": 5}, "norm_num_groups"),
    ],
)
def test_a_feature_that_is_not_built_is_refused(change, match):
    with pytest.raises(UserError, match=match):
        VAEConfig.from_json(CONFIGS["as_published"] | change)
