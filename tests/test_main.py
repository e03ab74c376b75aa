"""Mistakes: one line, one exit code, no device. The table below is the promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core import resumable
from smart_grpo_jax.core.errors import LINE_LIMIT
from smart_grpo_jax.runtime.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]

BASE = """
from smart_grpo_jax.core import config as configs

def get_config():
    config = configs.default()
    config.prompts.groups, config.prompts.members = 4, 4
    config.sampler.steps = config.sampler.eval_steps = 6
    config.search.rounds, config.search.candidates, config.search.elite = 1, 3, 0.67
    config.search.steps = [1, 2]
    config.train.epochs = 6
    {line}
    return config
"""


def override(*words):
    """A mistake on the command line."""
    return lambda folder: [good(folder), *(f"--config.{word}" for word in words)]


def words(*argv):
    """A mistake beside the config."""
    return lambda folder: [good(folder), *argv]


def file(line, *argv):
    """A mistake in one line of the config file."""
    return lambda folder: [write(folder, BASE.format(line=line)), *argv]


def text(content):
    """Another file altogether."""
    return lambda folder: [write(folder, content)]


def alone(*argv):
    """No config file at all."""
    return lambda folder: list(argv)


def good(folder):
    return write(folder, BASE.format(line="pass"))


def write(folder, content):
    path = folder / "tiny.py"
    path.write_text(content)
    return f"--config={path}"


SPLIT = ("search.credit=split", "search.members=0.5")

# What is wrong, and what the line must say: the field, then the value or what is wanted or the nearest name.
MISTAKES = {
    "unknown top field": (override("trian=1"), "trian", 'try "train"'),
    "unknown nested field": (override("train.lerning_rate=1"), "train.lerning_rate", 'try "learning_rate"'),
    "misspelt section": (override("sampelr.steps=4"), "sampelr", 'try "sampler"'),
    "nothing like a field": (override("sampler.zzz=1"), "sampler.zzz", "known: eval_guidance"),
    "three levels down": (override("sampler.window.knd=all"), "sampler.window.knd", 'try "kind"'),
    "unknown top field in the file": (file("config.trian = 1"), "trian", 'try "train"'),
    "unknown field in the file": (file("config.sampler.stpes = 1"), "sampler.stpes", 'try "steps"'),
    "a section by itself": (override("train=3"), "train", "is a section"),
    "a field of a number": (override("train.epochs.x=3"), "train.epochs", "no fields of its own"),
    "section set to a number": (file("config.train = 3"), "train", "got 3, wanted a section"),
    "override below a number": (file("config.train = 3", "--config.train.epochs=2"), "train", "got 3"),
    "text for a whole number": (override("train.epochs=many"), "train.epochs", 'got "many"'),
    "fraction for a whole number": (override("prompts.groups=4.5"), "prompts.groups", 'got "4.5"'),
    "exponent for a whole number": (override("train.epochs=1e3"), "train.epochs", 'got "1e3"'),
    "text for a number": (override("train.clip=tiny"), "train.clip", 'got "tiny"'),
    "text for a truth": (override("log.tensorboard=maybe"), "log.tensorboard", 'got "maybe"'),
    "truth for a whole number": (file("config.train.epochs = True"), "train.epochs", "got True"),
    "list for a whole number": (file("config.train.epochs = [1]"), "train.epochs", "got [1]"),
    "number for a text": (file("config.model.path = 3"), "model.path", "got 3, wanted text"),
    "number for steps": (file("config.search.steps = 1.5"), "search.steps", "got 1.5"),
    "mixed list": (file("config.search.steps = [1, 'a']"), "search.steps", "wanted a list of int"),
    "none for a number": (file("config.sampler.guidance = None"), "sampler.guidance", "got None"),
    "not a number": (override("train.learning_rate=nan"), "train.learning_rate", "finite"),
    "infinite": (override("sampler.guidance=inf"), "sampler.guidance", "finite"),
    "negative": (override("sampler.noise_level=-0.1"), "sampler.noise_level", "got -0.1, wanted ≥ 0"),
    "negative learning rate": (override("train.learning_rate=-1e-4"), "train.learning_rate", "got -0.0001"),
    "zero learning rate": (override("train.learning_rate=0"), "train.learning_rate", "wanted > 0"),
    "zero groups": (override("prompts.groups=0"), "prompts.groups", "got 0, wanted ≥ 1"),
    "one member": (override("prompts.members=1"), "prompts.members", "got 1, wanted ≥ 2"),
    "one step": (override("sampler.steps=1"), "sampler.steps", "got 1, wanted ≥ 2"),
    "seed too large": (override("seed=4294967296"), "seed", "wanted ≤"),
    "beta of one": (override("train.beta2=1"), "train.beta2", "got 1"),
    "rank zero": (override("adapter.rank=0"), "adapter.rank", "got 0"),
    "keep nothing": (override("checkpoint.keep=0"), "checkpoint.keep", "got 0"),
    "mesh axis zero": (override("mesh.tensor=0"), "mesh.tensor", "got 0"),
    "below auto": (override("mesh.fsdp=-1"), "mesh.fsdp", "got -1"),
    "floor above one": (override("search.sigma_floor=2"), "search.sigma_floor", "wanted ≤ 1"),
    "unknown type": (override("model.dtype=float16"), "model.dtype", 'got "float16"'),
    "misspelt choice": (override("sampler.transition=flwo"), "sampler.transition", 'try "flow"'),
    "unknown choice": (override("train.loss=dpo"), "train.loss", 'got "dpo"'),
    "resolution of another model": (override("model.resolution=25"), "model.resolution", "got 25, wanted 24"),
    "elite too small": (override("search.elite=0.1"), "search.elite", "got 0.1"),
    "one elite in five rounds": (override("search.elite=0.34", "search.rounds=5"), "search.elite", "spread"),
    "steps out of range": (override("search.steps=1,6"), "search.steps", "below sampler.steps = 6"),
    "steps twice": (override("search.steps=1,1"), "search.steps", "distinct"),
    "unknown steps": (override("search.steps=lat"), "search.steps", "late"),
    "window beyond the steps": (
        override("sampler.window.kind=fixed", "sampler.window.start=5"), "sampler.window.size", "steps = 6"),
    "sliding over all steps": (
        override("sampler.window.kind=sliding", "sampler.window.size=6"), "sampler.window.size", "6 - 1"),
    "sliding from the middle": (
        override("sampler.window.kind=sliding", "sampler.window.start=1"), "sampler.window.start", "got 1"),
    "end beyond the steps": (override("sampler.window.stop=7"), "sampler.window.stop", "got 7"),
    "no room in the window": (
        override("sampler.window.kind=random", "sampler.window.stop=2"), "sampler.window.stop", "got 2"),
    "updates that do not divide": (override("train.updates_per_epoch=3"), "train.updates_per_epoch", "4 × 4"),
    "calls that do not divide": (override("memory.rollout=3"), "memory.rollout", "got 3, wanted a divisor"),
    "split without a rest": (override("search.credit=split"), "search.members", "got 1"),
    "split that rounds to all": (
        override("search.credit=split", "search.members=0.9"), "search.members", "got 0.9 of 4"),
    "share of nobody": (override("search.members=0.1"), "search.members", "got 0.1 of 4"),
    "local for some": (override("search.credit=local", "search.members=0.5"), "search.members", "wanted 1"),
    "local of one": (
        override("search.credit=local", "search.candidates=1", "search.elite=1"), "search.candidates", "≥ 2"),
    "local in latents": (override("search.credit=local", "search.space=latent"), "search.space", "latent"),
    "local in a moving window": (
        override("search.credit=local", "sampler.window.kind=random"), "sampler.window.kind", "got random"),
    "credit without likelihood": (
        override("search.credit=offset", "train.loss=nft"), "search.credit", "got offset"),
    "density without likelihood": (
        override("train.log_prob=unnormalised", "train.loss=nft"), "train.log_prob", "got unnormalised"),
    "weights of steps without steps": (
        override("train.step_weight=guard", "train.loss=awm"), "train.step_weight", "wanted uniform"),
    "credit of parts": (override(*SPLIT, "train.adv_combine=normalise"), "train.adv_combine", "normalise"),
    "ode without noise": (
        override("sampler.transition=ode", "search.rounds=0"), "sampler.transition", "train.loss = ppo"),
    "search without noise": (
        override("sampler.transition=ode", "train.loss=nft"), "sampler.transition", "no noise to search"),
    "level without noise": (
        override("sampler.noise_level=0", "search.rounds=0"), "sampler.noise_level", "got 0"),
    "level above one": (
        override("sampler.transition=cps", "sampler.noise_level=1.5"), "sampler.noise_level", "got 1.5"),
    "evaluation searches nothing": (
        override("eval.search=true", "search.rounds=0"), "eval.search", "search.rounds = 0"),
    "evaluation has fewer steps": (
        override("eval.search=true", "sampler.eval_steps=2"), "search.steps", "eval_steps = 2"),
    "unknown reward": (override("rewards.shape=1"), "rewards", 'try "shapes"'),
    "unknown reward of the search": (override("search_reward.jpg=1"), "search_reward", 'got "jpg"'),
    "unknown reward of evaluation": (override("eval_rewards.shaped=1"), "eval_rewards", 'got "shaped"'),
    "a table by itself": (override("rewards=1"), "rewards", "rewards.NAME=WEIGHT"),
    "rewards set to a number": (file("config.rewards = 1"), "rewards", "got 1"),
    "row of a number": (file("config.rewards = 1", "--config.rewards.shapes=1"), "rewards", "got 1"),
    "weight as text": (override("rewards.shapes=high"), "rewards.shapes", "'high'"),
    "weight not a number": (override("rewards.shapes=nan"), "rewards.shapes", "finite"),
    "weight as text in a table": (override("rewards.shapes.weight=high"), "rewards.shapes", "'high'"),
    "no reward": (file("config.rewards = {}"), "rewards", "at least one"),
    "all rewards zero": (override("rewards.shapes=0"), "rewards", "at least one"),
    "search reward zero": (override("search_reward.shapes=0"), "search_reward", "at least one"),
    "unknown split": (override("prompts.source=shapes:trian"), "prompts.source", 'try "train"'),
    "unknown split of evaluation": (override("eval.source=shapes:heldot"), "eval.source", 'try "heldout"'),
    "missing prompts": (override("prompts.source=no/such.txt"), "prompts.source", 'got "no/such.txt"'),
    "half a data set": (override("prompts.source=tfds:coco"), "prompts.source", "NAME:SPLIT:FIELD"),
    "missing model": (override("model.path=no/such/model"), "model.path", 'got "no/such/model"'),
    "missing config file": (alone("--config=no/such.py"), "--config", "no file no/such.py"),
    "no config": (alone("--workdir=/nowhere"), "--config", "is missing"),
    "no get_config": (text("x = 1"), "--config", "no function get_config()"),
    "config is a dict": (text("def get_config():\n    return {}"), "--config", "gave dict"),
    "config raises": (text("def get_config():\n    return 1 / 0"), "--config", "ZeroDivisionError"),
    "config looks up a name": (file("{}['x']"), "--config", "KeyError"),
    "config with a syntax error": (text("def get_config(:"), "--config", "SyntaxError"),
    "config imports nothing": (text("import no_such_module"), "--config", "no_such_module"),
    "unknown mode": (words("--mode=trian"), "--mode", 'try "train"'),
    "unknown flag": (words("--wrokdir=x"), "--wrokdir", 'try "workdir"'),
    "flag without value": (words("--workdir"), "--workdir", "has no value"),
    "flag before a flag": (words("--workdir", "--mode=train"), "--workdir", "has no value"),
    "override without value": (words("--config.train.epochs"), "--config.train.epochs", "has no value"),
    "a bare word": (words("train"), "command line", 'got "train"'),
    "one dash": (words("-mode=train"), "command line", "-mode=train"),
    "negative seed of pictures": (words("--mode=sample", "--seed=-1"), "--seed", 'got "-1"'),
    "epoch in words": (words("--mode=eval", "--epoch=last"), "--epoch", 'got "last"'),
    "words beside another mode": (words("--mode=eval", "runs/a"), "command line", 'got "runs/a"'),
    "a band without a comparison": (words("--expect=x.json"), "--expect", "wanted --mode=compare"),
    "dry training": (words("--dry-run"), "--dry-run", "wanted --mode=experiment"),
    "nothing to compare": (words("--mode=compare"), "--mode=compare", "got no runs"),
    "no experiment": (words("--mode=experiment"), "--config", "has no EXPERIMENT"),
    "no report yet": (words("--mode=report", "--workdir=no/such/run"), "no/such/run", "no"),
}  # fmt: skip


def assert_one_line(stderr, says):
    """The whole contract of a message."""
    assert stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert len(stderr.rstrip("\n")) <= LINE_LIMIT and "Traceback" not in stderr
    for part in says:
        assert part in stderr


@pytest.fixture
def no_job(monkeypatch):
    """A mistake must be found before the job begins."""

    def begin(*_):
        raise AssertionError("the job has begun")

    for mode in ("train", "eval", "sample"):
        monkeypatch.setitem(entry.MODES, mode, begin)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line(mistake, tmp_path, monkeypatch, capsys, no_job):
    monkeypatch.chdir(ROOT)
    argv, *says = MISTAKES[mistake]
    assert entry.main(argv(tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, says)
    if not err.startswith(("--", "command line", "no/such")):
        assert err.split(":")[0].startswith(says[0])


def test_the_config_that_all_mistakes_start_from_is_right(tmp_path, no_job):
    with pytest.raises(AssertionError, match="the job has begun"):
        entry.main([good(tmp_path)])


def test_a_very_long_value_is_cut(tmp_path, capsys, no_job):
    assert entry.main([good(tmp_path), f"--config.model.path={'x' * 500}"]) == 2
    assert_one_line(capsys.readouterr().err, ["model.path", "…"])


def test_a_name_that_breaks_lines_stays_on_one(tmp_path, capsys, no_job):
    assert entry.main([good(tmp_path), "--config.model.path=a\nb"]) == 2
    assert_one_line(capsys.readouterr().err, ["model.path", "a b"])


PROBE = """
import contextlib, io, json, sys
from smart_grpo_jax.main import main
results = []
for argv in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    results.append([code, err.getvalue()])
bridge = sys.modules.get("jax._src.xla_bridge")
names = ("tensorflow", "torch", "transformers", "clu", "flax", "orbax")
heavy = [name for name in names if name in sys.modules]
print(json.dumps({"results": results, "backends": list(getattr(bridge, "_backends", {})), "heavy": heavy}))
"""


def probe(argvs, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(argvs),
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_neither_help_nor_a_mistake_touches_a_device_or_loads_a_framework(tmp_path):
    argvs = [
        ["--help"],
        [good(tmp_path), "--config.train.learning_rate=nan"],
        [good(tmp_path), "--config.rewards.shape=1"],
        [good(tmp_path), "--config.prompts.source=shapes:trian"],
        [good(tmp_path), "--mode=nothing"],
    ]
    # A platform that does not exist: whoever asks for a device fails loudly.
    found = probe(argvs, JAX_PLATFORMS="no_such_platform")
    assert [code for code, _ in found["results"]] == [0, 2, 2, 2, 2]
    assert found["backends"] == [] and found["heavy"] == []
    assert found["results"][0][1] == ""
    for _, err in found["results"][1:]:
        assert_one_line(err, [])


@pytest.mark.parametrize("mistake", ["unknown nested field", "unknown reward", "missing config file"])
def test_a_mistake_costs_a_real_process_one_line(mistake, tmp_path):
    argv, *says = MISTAKES[mistake]
    done = subprocess.run(
        [sys.executable, "-m", "smart_grpo_jax.main", *argv(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, says)


def test_help_shows_every_mode(capsys):
    assert entry.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(f"\n  {mode} " in out for mode in entry.MODES)


def test_a_run_cannot_be_taken_up_with_another_meaning(tmp_path, capsys):
    values = entry.run_file(good(tmp_path).removeprefix("--config="))
    stored = configs.to_dict(configs.from_dict(values))
    RunFolder.open(tmp_path / "run", config=stored, command=["first"], semantic=resumable.semantic).close()
    argv = [good(tmp_path), f"--workdir={tmp_path / 'run'}", "--config.train.learning_rate=0.1"]
    assert entry.main(argv) == 2
    assert_one_line(capsys.readouterr().err, ["train.learning_rate", "0.0003", "0.1"])
