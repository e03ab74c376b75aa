"""Pipelines in the formats of SD3.5-L and FLUX, from the command line: train, resume, export, sample."""

import json

import numpy as np
import pytest
import tiny_pipelines as folders
from PIL import Image

from smart_grpo_jax import main as entry
from smart_grpo_jax.hub import adapters
from smart_grpo_jax.runtime.metrics import read

CONFIG = """
from smart_grpo_jax.core import config as configs


def get_config(words=""):
    config = configs.default()
    config.model.path = "{model}"
    config.model.resolution, config.model.t5_length = 8, 9
    config.prompts.source = config.eval.source = "{prompts}"
    config.prompts.cache = "{cache}"
    config.prompts.groups, config.prompts.members = 2, 4
    config.sampler.steps, config.sampler.eval_steps = 4, 3
    config.sampler.guidance = config.sampler.eval_guidance = 3.0
    config.adapter.rank, config.adapter.alpha = 2, 8.0
    config.search.rounds, config.search.candidates, config.search.steps = 1, 4, [1]
    config.rewards = {{"compressibility": 1.0}}
    config.eval_rewards = {{}}
    config.train.epochs, config.train.learning_rate = 3, 0.01
    config.checkpoint.every = config.eval.every = 3
    config.eval.weights = "raw"
    config.log.tensorboard, config.log.samples = False, 3
    return config
"""

PROMPTS = ["a red circle", "two green square above a blue circle", "blue square", "a circle"]


def project(tmp_path, name):
    """A pipeline, prompts and a config; the arguments of the entry point."""
    model = folders.write(tmp_path / name, name, seed=2)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    text = CONFIG.format(model=model, prompts=tmp_path / "prompts.txt", cache=tmp_path / "cache")
    (tmp_path / "tiny.py").write_text(text)
    return [f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'run'}"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A FLUX run of three epochs with the search."""
    tmp_path = tmp_path_factory.mktemp("flux")
    command = project(tmp_path, "flux")
    assert entry.main(command) == 0
    return tmp_path, command


def test_smart_grpo_runs_on_flux_and_moves_it(flux):
    tmp_path, _ = flux
    lines = read(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert all(np.isfinite(line["train/reward"]) for line in lines[1:])
    images, steps, tried = 8, 4, 8 * 4
    # guidance is an input of this network: one call a step, not two
    assert lines[1]["nfe/velocity"] == images * steps + tried + images * (steps - 1)
    evaluations = [np.load(tmp_path / "run" / "eval" / f"{e}.npz")["images"] for e in (0, 3)]
    assert not np.array_equal(*evaluations)


def test_prompts_are_embedded_once_for_all_runs(flux, monkeypatch, capsys):
    from smart_grpo_jax.hub import text

    _, command = flux
    monkeypatch.setattr(text, "load_text", lambda *a, **k: pytest.fail("the encoders were loaded"))
    assert entry.main([*command, "--mode=eval"]) == 0


def test_an_export_loads_in_diffusers_as_the_card_says(flux, capsys):
    tmp_path, command = flux
    out = tmp_path / "out"
    flags = ["--mode=export", "--format=all", f"--out={out}"]
    assert entry.main([*command, *flags]) == 0
    told = json.loads((out / "export.json").read_text())
    assert {check["name"] for check in told["checks"]} == {"lora", "peft", "full", "orbax"}
    assert all(check["difference"] < 1e-5 < check["from_base"] for check in told["checks"])
    card = (out / "README.md").read_text()
    assert "FluxPipeline.from_pretrained" in card and told["state_hash"] in card
    assert told["files"][adapters.FILE] in card
    assert entry.main([*command, *flags]) == 0  # an export gives way to a new one
    assert entry.main([*command, "--mode=export", f"--out={tmp_path}"]) == 2  # nothing else does
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


def test_a_damaged_export_is_never_left_under_its_name(flux, monkeypatch, capsys):
    from smart_grpo_jax.hub import export

    tmp_path, command = flux
    write = export.write_lora
    monkeypatch.setattr(export, "write_lora", lambda *args: write(*args[:-1], 2 * args[-1]))
    out = tmp_path / "damaged"
    assert entry.main([*command, "--mode=export", f"--out={out}"]) == 6
    assert "velocity differs" in capsys.readouterr().err
    assert not out.exists()


def test_an_exported_lora_is_a_starting_point_and_samples_alike(flux, capsys):
    tmp_path, command = flux
    out = tmp_path / "start"
    assert entry.main([*command, "--mode=export", f"--out={out}"]) == 0
    sample = ["--mode=sample", "--prompts=a red circle|blue square"]
    assert entry.main([*command, *sample, f"--out={tmp_path / 'a'}"]) == 0
    assert entry.main([*command, *sample, f"--lora={out}", f"--out={tmp_path / 'b'}"]) == 0
    # folded into the weights instead of beside them: a last bit of float32, at most one step of 8 bits
    assert_alike(tmp_path / "a" / "000_plain.png", tmp_path / "b" / "000_plain.png", 1)
    begun = [command[0], f"--workdir={tmp_path / 'again'}", f"--config.adapter.init={out}"]
    assert entry.main([*begun, "--config.train.epochs=0"]) == 0
    last, first = (np.load(tmp_path / run / "eval" / f"{e}.npz") for run, e in (("run", 3), ("again", 0)))
    assert entry.main([*begun, "--config.adapter.rank=1", "--config.train.epochs=0"]) == 2
    assert "adapter.rank" in capsys.readouterr().err
    assert last["images"].shape == first["images"].shape


def assert_alike(a, b, steps):
    first, second = (np.asarray(Image.open(path)).astype(int) for path in (a, b))
    assert np.abs(first - second).max() <= steps


def test_pictures_do_not_depend_on_their_company_and_carry_what_made_them(flux, capsys):
    tmp_path, command = flux
    flags = ["--mode=sample", "--seed=5", "--size=8x20", "--steps=2", "--guidance=2"]
    assert entry.main([*command, *flags, "--prompts=a circle", f"--out={tmp_path / 'one'}"]) == 0
    more = ["--prompts=blue square|a circle|a red circle", "--seeds=2", f"--out={tmp_path / 'many'}"]
    assert entry.main([*command, *flags, *more]) == 0
    one, many = tmp_path / "one" / "000_plain.png", tmp_path / "many" / "001_plain_seed5.png"
    assert one.read_bytes() == many.read_bytes()
    assert one.read_bytes() != (tmp_path / "many" / "001_plain_seed6.png").read_bytes()
    info = Image.open(one).info
    assert (info["size"], info["steps"], info["guidance"], info["seed"]) == ("8x20", "2", "2.0", "5")
    assert Image.open(one).size == (20, 8)
    assert len(list((tmp_path / "many").iterdir())) == 7


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--mode=sample", "--size=9"], "multiples of 4 pixels"),
        (["--mode=sample", "--size=big"], "--size"),
        (["--mode=sample", "--steps=0"], "--steps"),
        (["--mode=sample", "--guidance=nan"], "--guidance"),
        (["--mode=sample", "--lora=no/such"], "LoRA"),
        (["--mode=export", "--format=zip"], "--format"),
        (["--mode=export", "--weights=mean"], "--weights"),
        (["--mode=export", "--config.adapter.kind=full", "--format=lora"], "--format"),
        (["--mode=export", "--epoch=7"], "--epoch: got 7"),
        (["--config.adapter.init=no/such"], "adapter.init"),
    ],
)
def test_a_mistake_is_one_line(flux, capsys, flags, match):
    _, command = flux
    assert entry.main([*command, *flags]) == 2
    err = capsys.readouterr().err
    assert match in err and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35-large", "sd35-medium", "sd3", "flux", "schnell"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_every_shape_trains_three_epochs_with_and_without_the_search(tmp_path, name, rounds):
    command = project(tmp_path, name)
    assert entry.main([*command, f"--config.search.rounds={rounds}"]) == 0
    lines = read(tmp_path / "run")
    assert lines[-1]["epoch"] == 3 and all(np.isfinite(line["train/reward"]) for line in lines[1:])
    assert entry.main([*command, f"--config.search.rounds={rounds}", "--mode=export", "--format=all"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("change", ["train.loss=nft", "adapter.kind=full", "train.loss=guard"])
def test_other_ways_to_learn_run_on_flux(tmp_path, change):
    command = project(tmp_path, "flux")
    assert entry.main([*command, f"--config.{change}", "--config.train.epochs=2"]) == 0
    assert entry.main([*command, f"--config.{change}", "--config.train.epochs=2", "--mode=export"]) == 0
