"""Paths, hub ids and what is said when neither is there."""

import json

import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.hub import locate


def cache(monkeypatch, tmp_path):
    """An empty cache of huggingface_hub, and how to put a snapshot into it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def add(owner, name):
        root = tmp_path / f"models--{owner}--{name}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("abc")
        snapshot = root / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
        return snapshot

    return add


def test_a_hub_id_is_the_snapshot_in_the_cache(monkeypatch, tmp_path):
    snapshot = cache(monkeypatch, tmp_path)("stabilityai", "stable-diffusion-3.5-medium")
    assert locate.pipeline_folder("stabilityai/stable-diffusion-3.5-medium") == snapshot


def test_an_absent_hub_id_says_what_to_type_and_to_accept(monkeypatch, tmp_path):
    cache(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=r"hf download stabilityai/stable-diffusion-3\.5-medium") as caught:
        locate.pipeline_folder("stabilityai/stable-diffusion-3.5-medium")
    assert "licence" in caught.value.line and len(caught.value.line) <= 200


def test_a_folder_goes_before_a_hub_id_of_the_same_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model_index\.json"):
        locate.pipeline_folder("owner/name")
    (tmp_path / "owner" / "name" / "model_index.json").write_text("{}")
    assert str(locate.pipeline_folder("owner/name")) == "owner/name"


@pytest.mark.parametrize("path", ["shape", "/no/such/folder", "a/b/c", "~/x y/z", ""])
def test_what_is_neither_is_refused(path):
    with pytest.raises(UserError, match=r"model\.path"):
        locate.pipeline_folder(path)
