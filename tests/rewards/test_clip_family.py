"""CLIPScore, PickScore, HPSv2 and the aesthetic predictor against PyTorch, on tiny random checkpoints.

The heads of the towers are 8 numbers wide, in open_clip's layout 8 and 12: no published width.
"""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_rewards as tiny

from smart_grpo_jax import load_reward
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import tables
from smart_grpo_jax.hub.tokenizers import load_tokenizer
from smart_grpo_jax.models.clip import CLIPText
from smart_grpo_jax.models.clip_vision import CLIPVision
from smart_grpo_jax.rewards import base, clip_models
from smart_grpo_jax.rewards.preprocess import PIPELINES
from smart_grpo_jax.runtime.compile_cache import CompileCount

pytestmark = pytest.mark.torch

REWARDS = tiny.ORIGINALS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return tiny.clips(tmp_path_factory.mktemp("clip"), torch)


@pytest.fixture(scope="module")
def scorers(made):
    """Every reward, loaded once."""
    return {
        name: load_reward(kind, str(made.root / folder), **options)
        for name, (kind, folder, options, _) in REWARDS.items()
    }


@pytest.mark.parametrize("size", tiny.SIZES)
@pytest.mark.parametrize("name", REWARDS)
def test_scores_are_those_of_pytorch(name, size, made, scorers):
    images = tiny.batch(*size)
    single, double = REWARDS[name][-1](made, images, tiny.PROMPTS)
    tiny.assert_parity(scorers[name](images, tiny.PROMPTS), single, double)


def test_image_and_text_vectors_are_those_of_pytorch(made):
    images, ids = tiny.batch(64, 71), tiny.clip_ids(made.root / "exact", tiny.PROMPTS)
    single, double = (made.exact.parts(images, ids, double=kind) for kind in (False, True))
    clip, root = clip_models.transformers_clip(str(made.root / "exact"), "", "pick_score")
    pixels = PIPELINES["clip"](images, clip.vision.image_size)
    params = clip.image_params(np.float32)
    tiny.assert_parity(CLIPVision(clip.vision).apply({"params": params}, pixels), single[0], double[0])
    tower = clip.text_tower(root, np.float32)
    np.testing.assert_array_equal(tower.tokenizer(tiny.PROMPTS), ids)
    out = CLIPText(clip.text).apply({"params": tower.params}, ids)
    tiny.assert_parity(out.pooled, single[1], double[1])


def test_padding_does_not_matter_and_the_first_end_token_is_read(made):
    clip, root = clip_models.transformers_clip(str(made.root / "exact"), "", "pick_score")
    ids = np.asarray(load_tokenizer(root, 77)(tiny.PROMPTS))
    end = ids.max()
    after = np.cumsum(ids == end, 1) - (ids == end) > 0
    params = tables.to_params(clip.text_table, clip.text, clip.reader)
    newer = dataclasses.replace(clip.text, eos_token_id=int(end))
    pooled = lambda config, ids: np.asarray(CLIPText(config).apply({"params": params}, ids).pooled)
    kept = pooled(clip.text, ids)
    assert after.any()
    np.testing.assert_array_equal(pooled(clip.text, np.where(after, 0, ids)), kept)
    np.testing.assert_array_equal(pooled(newer, np.where(after, 0, ids)), kept)
    np.testing.assert_array_equal(pooled(newer, ids), kept)


@pytest.mark.parametrize("name", REWARDS)
def test_images_of_one_prompt_are_ranked_as_pytorch_ranks_them(name, made, scorers):
    images = np.concatenate([tiny.pictures(64, 64, seed=seed) for seed in (0, 8, 16)])
    prompts = [tiny.PROMPTS[0]] * len(images)
    ours, (_, double) = scorers[name](images, prompts), REWARDS[name][-1](made, images, prompts)
    order = np.argsort(double, kind="stable")
    # scores that PyTorch's own float32 cannot tell apart (a Hessel score of 0) have no order
    assert (np.diff(double[order]) > 1e-4 * np.abs(double).max()).sum() >= 4
    assert (np.diff(ours[order]) >= -1e-5 * np.abs(double).max()).all()


@pytest.mark.parametrize("name", REWARDS)
def test_bfloat16_keeps_its_heads_in_float32_and_drifts_little(name, made, scorers):
    kind, folder, options, _ = REWARDS[name]
    reward = base.build(kind, str(made.root / folder), "bfloat16", **options)
    vision = reward.params["vision"]
    narrow = {str(a.dtype) for k in ("encoder", "patch_embedding") for a in jax.tree.leaves(vision[k])}
    wide = {
        str(vision[k][leaf].dtype)
        for k, leaf in (("visual_projection", "kernel"), ("post_layernorm", "scale"))
    }
    assert narrow == {"bfloat16"} and wide == {"float32"}
    images = np.concatenate([tiny.pictures(64, 64, seed=seed) for seed in (0, 8, 16)])
    prompts = [tiny.PROMPTS[1]] * len(images)
    full = scorers[name](images, prompts)
    got = load_reward(kind, str(made.root / folder), "bfloat16", **options)(images, prompts)
    drift = np.sqrt(np.mean((got - full) ** 2)) / full.std()
    print(name, drift)
    assert 0 < drift < 0.1, drift


def test_repeated_calls_compile_once(made):
    call = load_reward("clip_score", str(made.root / "quick"))
    call(tiny.batch(64, 64), tiny.PROMPTS)
    count = CompileCount()
    call(tiny.batch(64, 64)[::-1], [f"{p} house" for p in tiny.PROMPTS])
    assert count.total == 0


def test_hessel_is_blind_below_zero_and_cosine_is_not(made, scorers):
    images = np.concatenate([tiny.pictures(64, 64, seed=seed) for seed in range(4)])
    prompts = [tiny.PROMPTS[0]] * len(images)
    plain = load_reward("clip_score", str(made.root / "quick"), variant="cosine")(
        images, [tiny.HESSEL + prompts[0]] * len(images)
    )
    ours = scorers["clip_score as Hessel"](images, prompts)
    np.testing.assert_allclose(ours, 2.5 * np.maximum(plain, 0), atol=1e-6)  # one crop rule on squares


def test_pick_score_divided_by_26_is_flow_grpo_s(made, scorers):
    images = tiny.batch(64, 64)
    ours = load_reward("pick_score", str(made.root / "exact"), divisor=26.0)(images, tiny.PROMPTS)
    np.testing.assert_allclose(ours, scorers["pick_score"](images, tiny.PROMPTS) / 26, rtol=1e-6)


def test_both_versions_of_hps_are_found_in_their_folder(made):
    options = {"vision_heads": 5, "text_heads": 3}
    old, new = (base.build("hps", str(made.root / "hps"), version=v, **options) for v in ("2.0", "2.1"))
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    with pytest.raises(UserError, match="version"):
        base.build("hps", str(made.root / "hps"), version="3")


def test_numbers_of_the_command_line_are_floats_and_whole_ones_are_taken(made):
    options = {"version": 2.1, "vision_heads": 5.0, "text_heads": 3.0}
    got = base.build("hps", str(made.root / "hps"), **options)
    wanted = base.build("hps", str(made.root / "hps"), vision_heads=5, text_heads=3)
    jax.tree.map(np.testing.assert_array_equal, got.params, wanted.params)
    with pytest.raises(UserError, match=r"hps: vision_heads: got 2.5, wanted a whole number"):
        base.build("hps", str(made.root / "hps"), vision_heads=2.5)


OLD = {
    "_name_or_path": "", "add_cross_attention": False, "attention_dropout": 0.0, "bad_words_ids": None,
    "bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "do_sample": False,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "dropout": 0.0, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2, "finetuning_task": None, "initializer_factor": 1.0,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "pad_token_id": 1, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "task_specific_params": None,
    "temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None,
    "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "transformers_version": "4.24.0",
    "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
"""What transformers of the age of the published CLIP files wrote into every part of a config."""


def old_style(data):
    """The config of a file from 2022: both parts twice, the complete ones under the older names."""
    ends = {"text": {}, "vision": {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}}
    default = OLD | {"hidden_act": "quick_gelu"}
    old = {f"{part}_config_dict": default | ends[part] | data[f"{part}_config"] for part in ends}
    wrong = {part: {**data[part], "hidden_size": 1} for part in ("text_config", "vision_config")}
    whole = {"initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "torch_dtype": "float32"}
    return {**data, **whole, **old, **wrong}


def complete(made, folder):
    """Every key that transformers itself knows, defaults included."""
    (folder / "config.json").write_text(json.dumps(made.exact.config.to_dict()))


def verbose(made, folder):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old_style(data)))


def sharded(made, folder):
    (folder / "model.safetensors").unlink()
    made.exact.net.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    slim(made, folder)


def slim(made, folder):
    (folder / "config.json").write_text((made.root / "exact" / "config.json").read_text())


def torch_bin(made, folder):
    """A .bin of the old time, with the position ids that it holds as tensors."""
    (folder / "model.safetensors").unlink()
    state = made.exact.net.state_dict()
    for part, length in (("text", 77), ("vision", 17)):
        state[f"{part}_model.embeddings.position_ids"] = made.torch.arange(length)[None]
    made.torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("change", [complete, verbose, sharded, torch_bin])
def test_every_published_format_gives_the_same_parameters_and_sizes(change, made, tmp_path):
    tiny.write_clip_vocabulary(tmp_path)
    made.exact.write(tmp_path)
    change(made, tmp_path)
    (ours, _), (plain, _) = (
        clip_models.transformers_clip(str(p), "", "pick_score") for p in (tmp_path, made.root / "exact")
    )
    assert ours.vision == plain.vision and ours.text == plain.text
    trees = [base.build("pick_score", str(p)).params for p in (tmp_path, made.root / "exact")]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_config_that_leaves_defaults_out_means_quick_gelu(made):
    data = json.loads((made.root / "quick" / "config.json").read_text())
    assert "hidden_act" not in data["vision_config"] and "layer_norm_eps" not in data["text_config"]
    clip, _ = clip_models.transformers_clip(str(made.root / "quick"), "", "clip_score")
    assert clip.vision.hidden_act == clip.text.hidden_act == "quick_gelu"
    assert clip.vision.layer_norm_eps == clip.text.layer_norm_eps == 1e-5


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_files_are_computed_in_float32(kind, made, tmp_path):
    tiny.write_clip_vocabulary(tmp_path)
    made.exact.write(tmp_path)
    half = copy.deepcopy(made.exact.net).to(getattr(made.torch, kind))
    half.save_pretrained(tmp_path)
    slim(made, tmp_path)
    rounded = copy.copy(made.exact)
    rounded.net = half.float()
    images = tiny.batch(64, 64)
    single, double = (100 * v for v in tiny.cosines(made, rounded, images, tiny.PROMPTS))
    # the scale ln 100 is rounded as well
    scale = float(made.torch.exp(rounded.net.logit_scale.detach())) / 100
    ours = load_reward("pick_score", str(tmp_path))(images, tiny.PROMPTS)
    tiny.assert_parity(ours, single * scale, double * scale)
