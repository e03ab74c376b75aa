"""The way out from the command line: what is written, what is refused, and that nothing bad stays."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from smart_grpo_jax import flags, load_pipeline
from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import LINE_LIMIT, StorageError
from smart_grpo_jax.hub import adapters, export, safetensors
from smart_grpo_jax.jobs import assemble
from smart_grpo_jax.jobs import export as job
from smart_grpo_jax.models.lora import merge
from smart_grpo_jax.runtime.checkpoint import Checkpoints
from smart_grpo_jax.runtime.metrics import MetricLog
from smart_grpo_jax.runtime.run_folder import RunFolder

FULL = ("search.rounds=0", "prompts.cache=off")
# The one-layer pipeline lacks some of the published targets.
LORA = (
    *FULL,
    "adapter.kind=lora",
    "adapter.rank=4",
    "adapter.alpha=8",
    "adapter.targets=/attn/to_q$,/attn/to_out_0$,/ff/net_2$",
)
SCALE = 2.0
EPOCH = 3


def config_of(folder, *overrides):
    return entry.load_config(flags.parse(tiny_run.command(folder, *overrides), entry.MODES))


def moved(tree, seed):
    """Random weights of the size that training gives them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + jnp.asarray(rng.standard_normal(a.shape) / 8, jnp.float32), tree)


def store(folder, overrides, change=moved):
    """A run folder whose checkpoint holds moved weights, the average's other than the raw ones."""
    config = config_of(folder, *overrides)
    run = assemble.assemble(job.quiet(config), training=False)
    state = run.state()
    state = state._replace(params=change(state.params, 1), ema=change(state.ema, 2))
    with RunFolder.open(folder, config=configs.to_dict(config), command=["test"]):
        with Checkpoints(folder, keep=3, best_of=None) as checkpoints:
            checkpoints.save(EPOCH, state, {})
        with MetricLog(folder, tensorboard=False, resume_epoch=None) as log:
            log.write(0, 0, {"eval/reward": 0.25, "train/reward": 9.0})
            log.write(EPOCH, 6, {"eval/reward": 0.75})
    return folder, state


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of adapters, and its state."""
    return store(tmp_path_factory.mktemp("lora") / "run", LORA)


@pytest.fixture(scope="module")
def trained(stored):
    """What the job loads of it."""
    folder, _ = stored
    return job.load(config_of(folder, *LORA), str(folder), None, "ema")


@pytest.fixture(scope="module")
def everything(stored):
    """All forms, written by the command line; the folder and what was said."""
    folder, _ = stored
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert tiny_run.run(folder, *LORA, mode="export", flags=["--format=all"]) == 0
    return folder / "export" / f"epoch-{EPOCH}", said.getvalue()


def leftovers(folder):
    return [path.name for path in folder.iterdir() if ".tmp" in path.name]


def read(trained, path):
    return adapters.read(path, *trained.place)


def test_every_form_is_written_checked_and_counted(everything):
    out, said = everything
    checks = {c["name"]: c for c in json.loads((out / "export.json").read_text())["checks"]}
    assert list(checks) == ["lora", "peft", "full", "orbax"]
    assert checks["lora"]["tensors"] == checks["peft"]["tensors"] == 6
    reader = safetensors.open_folder(out / "transformer", export.BASE)
    assert checks["full"]["tensors"] == len(reader.keys())
    for name, check in checks.items():
        # the sums of float32 in another order; what the adapter does is four orders above
        assert check["difference"] <= 1e-5 and check["from_base"] > 1e-2 and check["learned"] > 1e-2
        assert f"{name:<7}  {check['tensors']}/{check['tensors']}" in said
    assert "WARNING" not in said and not leftovers(out.parent)


def test_the_card_tells_hashes_scores_and_what_made_it(everything, stored):
    out, _ = everything
    folder, _ = stored
    text, told = (out / "README.md").read_text(), json.loads((out / "export.json").read_text())
    for name, digest in told["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest and digest in text
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written - set(told["files"]) == {"README.md", "export.json"}
    assert told["state_hash"] == tiny_run.state_hash(folder) and told["state_hash"] in text
    assert told["evaluation"] == {"reward": {"base": 0.25, "trained": 0.75}}
    for words in (
        "averaged weights of epoch 3",
        "| reward | 0.25 | 0.75 |",
        "shapes 1",
        "| seed | 0 |",
        "jax ",
    ):
        assert words in text


def test_the_average_is_exported_unless_raw_weights_are_asked_for(everything, stored, trained, tmp_path):
    folder, state = stored
    out, _ = everything
    assert (
        tiny_run.run(folder, *LORA, mode="export", flags=["--weights=raw", f"--out={tmp_path / 'raw'}"]) == 0
    )
    for path, weights in ((out, state.ema), (tmp_path / "raw", state.params)):
        jax.tree.map(np.testing.assert_array_equal, read(trained, path), job.folded(weights, SCALE))
    told = json.loads((tmp_path / "raw" / "export.json").read_text())
    assert told["evaluation"] == {}  # the run has evaluated its average
    assert "raw weights of epoch 3" in (tmp_path / "raw" / "README.md").read_text()


def test_the_orbax_trees_are_what_the_cards_lines_restore_on_other_devices(everything, stored, trained):
    out, _ = everything
    _, state = stored
    block = (out / "README.md").read_text().split("orbax:\n\n```python\n")[1].split("```")[0]
    code = block.replace("/ABSOLUTE/PATH/TO/THIS/FOLDER", str(out))
    assert len([line for line in code.splitlines() if line]) <= 3
    names = {}
    exec(code, names)
    whole = merge(trained.run.frozen["params"], state.ema, SCALE)
    jax.tree.map(np.testing.assert_array_equal, names["params"], whole)
    found = names["ocp"].StandardCheckpointer().restore(out / "orbax" / "trained")
    jax.tree.map(np.testing.assert_array_equal, found, state.ema)
    assert not (out / "orbax" / "merged" / "_sharding").exists()  # orbax refuses another topology by it


def test_the_exports_are_the_trainers_model_in_this_package(everything, stored, trained):
    out, _ = everything
    own = job.velocity(
        trained, trained.run.velocity, trained.run.policy.bind(trained.run.frozen, trained.weights)
    )
    pipe = load_pipeline(trained.run.config.model.path, lora=out, text=False)
    params = {"params": pipe.params["transformer"], "lora": {}}
    found = job.velocity(trained, pipe.velocity_fn(), params)
    np.testing.assert_allclose(found, own, atol=1e-5 * np.abs(own).max())


@pytest.mark.slow
@pytest.mark.torch
def test_the_lines_of_the_card_draw_the_same_picture_from_every_form(everything):
    import torch

    out, _ = everything
    blocks = (out / "README.md").read_text().split("```python\n")[1:]
    pictures = {}
    for name, block in zip(("lora", "peft", "full"), blocks, strict=False):
        code = block.split("```")[0].replace("PATH/TO/THIS/FOLDER", str(out))
        code = code.replace("torch.bfloat16", "torch.float32").replace('"cuda"', '"cpu"')
        torch.manual_seed(0)
        names = {}
        exec(code, names)
        pictures[name] = names.get("image") or names["net"]
    lora, full = (np.asarray(pictures[name]).astype(int) for name in ("lora", "full"))
    assert lora.shape == (24, 24, 3) and np.abs(lora - full).max() <= 1  # a rounding of 8 bits
    assert np.ptp(lora) > 10
    assert type(pictures["peft"]).__name__ == "PeftModel"


def test_velocities_are_compared_in_full_float32_on_every_device(trained):
    seen = []

    def network(params, x, t, cond, scale):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    job.velocity(trained, network, {})
    assert seen == ["highest"]


def test_all_weights_are_exported_whole(tmp_path, capsys):
    folder, state = store(tmp_path / "run", FULL, lambda tree, seed: jax.tree.map(lambda a: a * 1.01, tree))
    assert tiny_run.run(folder, *FULL, mode="export", flags=["--format=lora"]) == 2
    assert "--format: got lora, wanted full or orbax with adapter.kind = full" in capsys.readouterr().err
    assert tiny_run.run(folder, *FULL, mode="export", flags=["--format=all"]) == 0
    out = folder / "export" / f"epoch-{EPOCH}"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "export.json", "orbax", "transformer"]
    assert "base_model_relation: finetune" in (out / "README.md").read_text()
    assert [p.name for p in (out / "orbax").iterdir()] == ["merged"]
    import orbax.checkpoint as ocp

    found = ocp.StandardCheckpointer().restore(out / "orbax" / "merged")
    table = found["pos_embed"].pop("pos_embed")  # data: stored, exported, never learned
    jax.tree.map(np.testing.assert_array_equal, found, state.ema)
    np.testing.assert_array_equal(
        safetensors.open_folder(out / "transformer", export.BASE).tensor("pos_embed.pos_embed"), table
    )


def test_weights_that_have_not_moved_say_so(tmp_path, capsys):
    folder, _ = store(tmp_path / "run", LORA, lambda tree, seed: tree)
    assert tiny_run.run(folder, *LORA, mode="export") == 0
    assert "WARNING: these weights are still the base's" in capsys.readouterr().out
    card = (folder / "export" / f"epoch-{EPOCH}" / "README.md").read_text()
    assert "Note: these weights are still the base's: nothing has been learned yet." in card


def test_rounding_that_hides_what_was_learned_says_so(trained):
    check = export.Check("full", 43, 8e-3, 1e-2, 1e-2)
    assert "full: the velocity is off by 8.0e-03" in job.doubts(trained, [check])[0]
    assert job.doubts(trained, [check._replace(difference=1e-3)]) == []


def mistakes(folder, tmp_path):
    """What is wrong → (arguments beside the config, what the line says)."""
    (tmp_path / "taken").mkdir()
    return {
        "no checkpoint": ((), [], tmp_path / "none", "no checkpoint to export"),
        "another epoch": ((), ["--epoch=9"], folder, "--epoch: got 9, wanted one of 3"),
        "another format": ((), ["--format=zip"], folder, '--format: got "zip"'),
        "other weights": ((), ["--weights=best"], folder, '--weights: got "best"'),
        "a folder in use": ((), [f"--out={tmp_path / 'taken'}"], folder, "exists and is no export"),
        "this folder": ((), ["--out=."], folder, "exists and is no export"),
        "another alpha": (["adapter.alpha=9"], [], folder, "adapter.alpha: this run was started with 8.0"),
        "another rank": (["adapter.rank=5"], [], folder, "adapter.rank: this run was started with 4"),
        "another kind": (["adapter.kind=full"], [], folder, "adapter.kind"),
    }


def test_a_mistake_is_one_line_and_no_model_is_loaded(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(assemble, "assemble", lambda *a, **k: pytest.fail("a model was loaded"))
    for name, (overrides, given, folder, says) in mistakes(stored[0], tmp_path).items():
        assert tiny_run.run(folder, *LORA, *overrides, mode="export", flags=given) == 2, name
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1 and len(err) <= LINE_LIMIT + 1, name


def flip(path):
    """The last byte of the last tensor, whose lowest bit no velocity shows."""
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1
    path.write_bytes(bytes(raw))


def drop(path):
    reader = safetensors.Tensors(path)
    left = {key: reader.tensor(key) for key in sorted(reader.keys())[:-2]}
    safetensors.save_file(left, path, reader.metadata())


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, drop, cut])
@pytest.mark.parametrize("form", ["lora", "full"])
def test_damage_between_writing_and_reading_is_caught(trained, tmp_path, monkeypatch, form, damage):
    write = safetensors.write

    def damaged(path, *rest):
        write(path, *rest)
        damage(path)

    monkeypatch.setattr(safetensors, "write", damaged)
    with pytest.raises(StorageError, match=f"export {form}"):
        job.FORMS[form](trained, tmp_path)


@pytest.mark.parametrize("name", ["merged", "trained"])
def test_damage_in_an_orbax_tree_is_caught(trained, tmp_path, monkeypatch, name):
    load = job.load_params

    def damaged(path, like):
        tree = load(path, like)
        if path.name != name:
            return tree
        # one unit in the last place of each number
        return jax.tree.map(lambda a: jnp.nextafter(a, jnp.inf), tree)

    monkeypatch.setattr(job, "load_params", damaged)
    with pytest.raises(StorageError, match=r"export orbax: .* has come back with other bits"):
        job.FORMS["orbax"](trained, tmp_path)


def test_another_scale_in_pefts_config_is_caught(trained, tmp_path, monkeypatch):
    write = export.write_peft

    def damaged(out, table, config, lora, rank, alpha, base):
        write(out, table, config, lora, rank, alpha * (1 + 1e-6), base)

    monkeypatch.setattr(export, "write_peft", damaged)
    with pytest.raises(StorageError, match="export peft"):
        job.FORMS["lora"](trained, tmp_path)


def test_a_failed_export_leaves_nothing_and_the_earlier_one(stored, tmp_path, monkeypatch, capsys):
    folder, _ = stored
    argv = {"mode": "export", "flags": [f"--out={tmp_path / 'out'}"]}
    assert tiny_run.run(folder, *LORA, **argv) == 0
    before = (tmp_path / "out" / adapters.FILE).read_bytes()
    write = safetensors.write
    monkeypatch.setattr(safetensors, "write", lambda path, *rest: (write(path, *rest), flip(path)))
    capsys.readouterr()
    assert tiny_run.run(folder, *LORA, **argv) == 6
    err = capsys.readouterr().err
    assert "export lora" in err and err.count("\n") == 1
    assert (tmp_path / "out" / adapters.FILE).read_bytes() == before and not leftovers(tmp_path)
    assert tiny_run.run(folder, *LORA, mode="export", flags=[f"--out={tmp_path / 'new'}"]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_training_starts_where_a_lora_of_others_ends(everything, trained, tmp_path):
    out, _ = everything
    wanted = job.velocity(
        trained, trained.run.velocity, trained.run.policy.bind(trained.run.frozen, trained.weights)
    )
    for path, rank, alpha in ((out, 6, 3.0), (out / "peft", 4, 8.0)):
        changed = (f"adapter.rank={rank}", f"adapter.alpha={alpha}", f"adapter.init={path}")
        run = assemble.assemble(
            config_of(tmp_path / "run", *LORA, *changed), trained.run.eval_items, training=False
        )
        state = run.state()
        begun = job.Trained(run, state.params, 0, "raw", "")
        found = job.velocity(begun, run.velocity, run.policy.bind(run.frozen, state.params))
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        factors = jax.tree_util.tree_leaves_with_path(state.params)
        assert {leaf.shape[-1] for path, leaf in factors if path[-1].key == "a"} == {rank}
        jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)


STARTS = {
    "no file": (["adapter.init=no/such"], "adapter.init: no/such: wanted a LoRA file"),
    "all weights": (["adapter.init={out}", "adapter.kind=full"], "adapter.init"),
    "a folder of something else": (["adapter.init={out}/transformer"], "adapter.init: "),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_that_cannot_be_costs_one_line_before_a_device_is_touched(
    everything, tmp_path, capsys, name, monkeypatch
):
    out, _ = everything
    overrides, says = STARTS[name]
    monkeypatch.setitem(entry.MODES, "train", lambda *_: pytest.fail("the job has begun"))
    given = [override.format(out=out) for override in overrides]
    assert tiny_run.run(tmp_path / "run", *LORA, *given) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.torch
def test_two_epochs_from_the_command_line_go_out_and_come_in_again(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    short = ("train.epochs=2", "eval.prompts=4", "checkpoint.every=5", "eval.every=0", "train.ema.every=1")
    argv = [*LORA, *short, "train.learning_rate=0.01"]
    assert tiny_run.run(tmp_path / "run", *argv) == 0
    assert tiny_run.run(tmp_path / "run", *argv, mode="export") == 0
    out = tmp_path / "run" / "export" / "epoch-2"
    check = json.loads((out / "export.json").read_text())["checks"][0]
    assert check["difference"] <= 1e-5 < check["learned"]
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_run.one_layer(), **absent)
    pipe.load_lora_weights(out)
    keys = [name for name, _ in pipe.transformer.named_parameters() if "lora_" in name]
    assert len(keys) == check["tensors"]
    # epoch 0 of the second run evaluates what the first one ended with
    assert tiny_run.run(tmp_path / "again", *argv, f"adapter.init={out}") == 0
    last, first = (
        tiny_run.read(tmp_path / name)[i]["eval/reward"] for name, i in (("run", -1), ("again", 0))
    )
    assert abs(last - first) < 1e-5  # the folded scale rounds otherwise
    assert (
        tiny_run.read(tmp_path / "again")[0]["eval/reward"]
        != tiny_run.read(tmp_path / "run")[0]["eval/reward"]
    )


@pytest.mark.slow
def test_an_export_made_on_four_devices_holds_the_same_bits_and_restores_on_one(everything, stored, tmp_path):
    out, _ = everything
    folder, _ = stored
    given = tiny_run.command(
        folder, *LORA, mode="export", flags=["--format=all", f"--out={tmp_path / 'out'}"]
    )
    done = subprocess.run(
        [sys.executable, "-m", "smart_grpo_jax.main", *given],
        env=tiny_run.environment(JAX_NUM_CPU_DEVICES="4"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # not the files' bytes: their library leaves the order of the two remarks in a header to chance
    weights = [path.relative_to(out) for path in out.rglob("*.safetensors")]
    assert len(weights) == 3
    for name in weights:
        ours, theirs = (safetensors.Tensors(path / name) for path in (out, tmp_path / "out"))
        meant = {key: ours.tensor(key) for key in ours.keys()}
        export.same_keys(str(name), theirs, meant)
        export.same_tensors(str(name), theirs, meant.items())
    import orbax.checkpoint as ocp

    trees = [
        ocp.StandardCheckpointer().restore(path / "orbax" / "merged") for path in (out, tmp_path / "out")
    ]
    jax.tree.map(np.testing.assert_array_equal, *trees)
