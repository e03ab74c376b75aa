"""Who attends how: the devices of the mesh decide, and a choice that cannot run is refused at the door."""

import types

import numpy as np
import pytest

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import resumable
from smart_grpo_jax.jobs import assemble
from tests.jobs import tiny_run


def config(**model):
    values = configs.default()
    values.model.update(model)
    return configs.from_dict(values)


@pytest.mark.parametrize(
    ("platform", "dtype", "want"),
    [
        ("tpu", "bfloat16", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
        ("cpu", "bfloat16", "xla"),
    ],
)
def test_the_mesh_decides_and_not_the_process(platform, dtype, want):
    device = types.SimpleNamespace(platform=platform, compute_capability="9.0")
    mesh = types.SimpleNamespace(devices=np.array([[[device]]]))
    asked = []
    pipe = types.SimpleNamespace(
        transformer=types.SimpleNamespace(attention_head_dim=64),
        velocity_fn=lambda *_, attention, **__: asked.append(attention),
    )
    assemble.raw_velocity(config(dtype=dtype), pipe, mesh)
    assert asked == [want, want]  # the adapted network and its reference


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_kernel_of_another_platform_is_refused_before_anything_is_read(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(assemble.hub, "load_pipeline", None)
    assert tiny_run.run(tmp_path / "run", f"model.attention={name}") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"model.attention: got {name}" in line and "on cpu with float32" in line


def test_another_attention_is_no_other_run():
    before, after = (configs.to_dict(config(attention=name)) for name in ("xla", "chunked"))
    assert before != after and resumable.semantic(before) == resumable.semantic(after)
