"""A whole run, small: what it writes, that it repeats itself, and every kind of credit."""

import json

import numpy as np
import pytest
import tiny_run
from PIL import Image

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.jobs import assemble, evaluate, traced
from smart_grpo_jax.runtime.manifest import read_manifest
from smart_grpo_jax.runtime.metrics import read

SHORT = ("train.epochs=2", "eval.prompts=4", "checkpoint.every=5", "eval.every=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run to its end; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("train") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
        code = tiny_run.run(folder)
    assert code == 0, lines
    return folder, "\n".join(lines)


def test_a_run_leaves_everything_that_is_promised(whole):
    folder, _ = whole
    config = json.loads((folder / "config.json").read_text())
    assert configs.from_dict(config).prompts.groups == 4
    assert "smart_grpo_jax.main" in (folder / "command.txt").read_text()
    assert {"versions", "devices", "git"} <= set(json.loads((folder / "env.json").read_text()))
    assert [row["epoch"] for row in read(folder)] == list(range(5))
    assert tiny_run.epochs(folder) == [0, 2, 4]
    for epoch in tiny_run.epochs(folder):
        manifest = read_manifest(folder / "checkpoints" / str(epoch))
        assert manifest["epoch"] == epoch and len(manifest["state_hash"]) == 64
    for epoch in (0, 2, 4):
        assert Image.open(folder / "samples" / f"{epoch}.png").size[0] > 96
        with np.load(folder / "eval" / f"{epoch}.npz", allow_pickle=False) as stored:
            assert len(stored["prompts"]) == 12 and stored["score:shapes"].shape == (12, 1)
    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")


def test_a_run_says_what_it_is_how_it_goes_and_what_came_of_it(whole):
    _, printed = whole
    assert "1 × 3, elite 0.67, steps 1 (t=" in printed and "groups × members" in printed
    assert all(f"epoch {epoch}/4 " in printed for epoch in range(5))
    assert "paired difference, 95 % (12 held-out prompts)" in printed and "report.html" in printed
    assert "WARNING" not in printed  # above all: nothing was compiled again


def test_every_line_tells_reward_cost_and_health(whole):
    folder, _ = whole
    rows = read(folder)
    for row in rows[1:]:
        assert np.isfinite(row["train/reward"]) and row["train/failed"] == 0
        assert row["update/first_ratio_error"] <= 1e-6 and row["update/skipped"] == 0
        assert row["update/grad_norm"] > 0 and row["step"] == 2 * row["epoch"]
        assert "search/step_1/last" in row and "search/step_0/last" not in row
    assert [row["epoch"] for row in rows if "eval/reward" in row] == [0, 2, 4]
    assert rows[0]["nfe/velocity"] == 0
    images, tried = 16, 16 * 2 * 3
    learned = 16 * 5
    assert rows[3]["nfe/velocity"] == 3 * (images * 6 + tried + learned)
    assert rows[3]["nfe/images"] == 3 * images


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(whole, tmp_path):
    folder, _ = whole
    assert tiny_run.run(tmp_path / "again") == 0
    assert tiny_run.timeless(tmp_path / "again") == tiny_run.timeless(folder)
    assert tiny_run.state_hash(tmp_path / "again") == tiny_run.state_hash(folder)


@pytest.mark.slow
def test_another_seed_gives_other_numbers_but_the_same_first_evaluation(whole, tmp_path):
    folder, _ = whole
    assert tiny_run.run(tmp_path / "other", *SHORT[:1], "eval.every=0", "seed=1") == 0
    ours, other = read(folder), read(tmp_path / "other")
    assert other[0]["eval/reward"] == ours[0]["eval/reward"]
    assert other[1]["train/reward"] != ours[1]["train/reward"]


def test_a_finished_run_has_nothing_more_to_do_and_more_epochs_go_on(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    assert tiny_run.run(folder, *SHORT) == 0
    before = tiny_run.timeless(folder)
    assert tiny_run.run(folder, *SHORT) == 0
    assert tiny_run.timeless(folder) == before
    assert "resumed after epoch 2" in capsys.readouterr().out
    assert tiny_run.run(folder, *SHORT, "train.epochs=3") == 0
    assert tiny_run.timeless(folder)[:3] == before and len(tiny_run.timeless(folder)) == 4
    assert tiny_run.run(folder, *SHORT, "train.clip=0.5") == 2
    assert "train.clip" in capsys.readouterr().err


# Each program takes long to compile, so every row tries several options that do not touch one another.
VARIANTS = {
    "flow; awm in parts, two rewards": (
        "search.rounds=0", "train.loss=awm", "train.clip=1", "memory.train=4", "rewards.compressibility=0.1",
        "train.adv_combine=normalise",
    ),
    "offset": ("search.credit=offset",),
    "split; cps, moving window, in parts": (
        "search.credit=split", "search.members=0.5", "sampler.transition=cps", "sampler.window.kind=sliding",
        "sampler.window.size=2", "search.steps=all", "memory.decode=6", "memory.reward=5", "memory.train=20",
        "search.chunk=5",
    ),
    "half searched; nft on adapters, guided": (
        "search.members=0.5", "train.loss=nft", "adapter.kind=lora", "adapter.rank=4", "adapter.alpha=8",
        "adapter.targets=/attn/to_q$,/attn/to_v$,/ff/net_2$", "sampler.guidance=3", "search.guidance=1",
    ),
    "difference; guard with kl, dance, latent": (
        "search.credit=difference", "train.loss=guard", "train.clip=1e-5", "train.kl_weight=0.01",
        "train.step_weight=guard", "sampler.transition=dance", "sampler.noise_level=0.3",
        "search.space=latent", "search_reward.shapes=1",
    ),
    "local": ("search.credit=local", "search.rounds=2"),
    "cps at all steps": ("sampler.transition=cps", "sampler.noise_level=0.8", "search.rounds=0"),
    "local, by the base's forecast": ("search.credit=local", "search.forecast=base", "search.lookahead=2"),
}  # fmt: skip


QUICK = ("half searched; nft on adapters, guided",)
"""The others are slow, and the parts that they join are tested on a toy policy in tests/policy."""


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in QUICK else pytest.mark.slow) for v in VARIANTS]
)
def test_every_way_to_learn_runs(variant, tmp_path, capsys):
    assert tiny_run.run(tmp_path / "run", *SHORT, *VARIANTS[variant]) == 0, capsys.readouterr().err
    rows = read(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert np.isfinite(row["train/reward"]) and row["update/skipped"] == 0 and row["update/grad_norm"] > 0
        # the last noisy step of CPS has so little noise that the roundings of the velocity are seen in it
        assert row.get("update/first_ratio_error", 0.0) <= (1e-4 if "cps at" in variant else 1e-6)
    base, tuned = (read_manifest(tmp_path / "run" / "checkpoints" / str(e))["state_hash"] for e in (0, 2))
    assert base != tuned
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.slow
def test_images_come_from_the_average_where_it_is_asked_for(tmp_path):
    """An average that is never due stays at the base: what is trained beside it cannot be seen."""
    still = ("train.loss=nft", "search.rounds=0", "train.ema.every=1000")

    def seen(name, *more):
        assert tiny_run.run(tmp_path / name, *SHORT, *still, *more) == 0
        return [row["train/reward"] for row in read(tmp_path / name)[1:]]

    average = "train.actor=ema"
    slow, fast = (seen(f"ema{rate}", average, f"train.learning_rate={rate}") for rate in (1e-5, 1e-2))
    trained = seen("raw", "train.learning_rate=1e-2")
    assert slow == fast and trained[0] == fast[0] and trained[1] != fast[1]


@pytest.mark.slow
def test_rollouts_in_parts_give_the_same_rewards(whole, tmp_path):
    folder, _ = whole
    assert tiny_run.run(tmp_path / "run", *SHORT, "memory.rollout=2") == 0
    # one batch size or the other: a last bit per layer and step
    assert abs(read(tmp_path / "run")[1]["train/reward"] - read(folder)[1]["train/reward"]) < 1e-5


def test_pictures_of_the_trained_policy_carry_their_parameters(whole, tmp_path, capsys):
    folder, _ = whole
    wanted = "a photo of a red circle|a photo of two blue squares"
    flags = (f"--prompts={wanted}", "--seed=3")
    for name in ("a", "b"):
        more = (f"--out={tmp_path / name}",)
        assert tiny_run.run(folder, "eval.search=true", mode="sample", flags=flags + more) == 0
    first, again = tmp_path / "a", tmp_path / "b"
    names = sorted(p.name for p in first.iterdir())
    assert names == ["000_plain.png", "000_searched.png", "001_plain.png", "001_searched.png", "sheet.png"]
    assert all((first / n).read_bytes() == (again / n).read_bytes() for n in names)
    info = Image.open(first / "001_searched.png").info
    assert info["prompt"] == "a photo of two blue squares" and info["weights"] == "epoch 4"
    assert (first / "000_plain.png").read_bytes() != (first / "000_searched.png").read_bytes()
    assert "5 pictures" not in capsys.readouterr().out


def test_evaluation_compares_checkpoint_and_base_on_equal_noise(whole, capsys):
    folder, _ = whole
    assert tiny_run.run(folder, mode="eval") == 0
    out = capsys.readouterr().out
    assert "epoch 4" in out and "base" in out
    rows = read(folder)
    line = next(line for line in out.splitlines() if line.startswith(("shapes", "reward", "graded")))
    assert f"{rows[0]['eval/shapes']:.3f}" in line and f"{rows[-1]['eval/shapes']:.3f}" in line
    assert tiny_run.run(folder, mode="eval", flags=["--epoch=5"]) == 2
    assert "no checkpoint of epoch 5" in capsys.readouterr().err


@pytest.mark.slow
def test_searched_sampling_is_shown_beside_the_base(whole, capsys):
    folder, _ = whole
    assert tiny_run.run(folder, "eval.search=true", mode="eval") == 0
    assert "epoch 4, searched noise" in capsys.readouterr().out


def test_a_report_can_be_made_again(whole):
    folder, _ = whole
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert tiny_run.run(folder, mode="report") == 0
    assert (folder / "report.html").read_bytes() == before


class Square:
    """As much of a pipeline as the shape of a rollout asks for."""

    def latent_shape(self, size=None):
        return (3, 3, 16)


def static(*overrides):
    """The static and the traced part of a rollout for the tiny config."""
    values = configs.default()
    for name, text in (o.split("=") for o in ("prompts.groups=4", "prompts.members=4", *overrides)):
        configs.override(values, name, text)
    config = configs.from_dict(values)
    times = np.linspace(1, 0, config.sampler.steps + 1, dtype=np.float32)
    import jax

    knobs = traced.rollout_knobs(config, times, 0)
    shapes = jax.tree.map(lambda a: (np.shape(a), np.asarray(a).dtype), knobs)
    return assemble.rollout_shape(config, Square(), times), str(jax.tree.structure(knobs)), str(shapes)


@pytest.mark.parametrize(
    "overrides",
    [
        ("search.rounds=0",),
        ("search.steps=none",),
        ("search.steps=early",),
        ("search.steps=1,3",),
        ("sampler.noise_level=0.2",),
        ("search.returns=best", "search.select=random"),
        ("search.sigma_floor=0.1", "search.smoothing=0.5", "search.noise_norm=rms"),
        ("search.credit=offset", "search.offset=2"),
        ("search.execute=random",),
        ("sampler.window.kind=sliding",),
        ("train.learning_rate=1e-5", "seed=7"),
    ],
)
def test_one_rollout_program_serves_flow_grpo_and_every_search_of_its_shape(overrides):
    assert static(*overrides) == static()


@pytest.mark.slow
def test_without_a_searched_step_the_trajectories_are_flow_grpos(tmp_path):
    for name, override in (("none", "search.steps=none"), ("flow", "search.rounds=0")):
        # as many rounds as the program has when there are none, so that both are one program
        rounds = () if name == "flow" else (f"search.rounds={traced.DEFAULT_ROUNDS}",)
        assert tiny_run.run(tmp_path / name, *SHORT, override, *rounds) == 0
    assert tiny_run.timeless(tmp_path / "none") == tiny_run.timeless(tmp_path / "flow")
    assert tiny_run.state_hash(tmp_path / "none") == tiny_run.state_hash(tmp_path / "flow")


def test_a_search_without_a_noisy_step_is_refused(tmp_path, capsys):
    assert tiny_run.run(tmp_path / "run", "search.steps=5") == 2
    assert "search.steps: got (5,), wanted at least one noisy step" in capsys.readouterr().err


def test_evaluation_without_noise_is_the_pipelines_own_sampler_to_the_bit(tmp_path):
    import jax
    import jax.numpy as jnp

    from smart_grpo_jax.hub.pipeline import load_pipeline
    from smart_grpo_jax.maths import rng

    values = configs.default()
    for name, text in (("sampler.eval_steps", "6"), ("sampler.eval_guidance", "3"), ("eval.prompts", "4")):
        configs.override(values, name, text)
    run = assemble.assemble(configs.from_dict(values))
    found = evaluate.evaluator(run)(run.state().params)
    texts = [item.text for item in run.eval_items]
    ids = [assemble.prompt_data.prompt_id(text) for text in texts]
    keys = [rng.key(evaluate.EVAL_SEED, "latent", 0, i, 0) for i in ids]
    latents = jnp.stack([jax.random.normal(key, run.pipeline.latent_shape()) for key in keys])
    images = load_pipeline("shapes").sample(texts, latents=latents, num_steps=6, guidance=3.0)
    assert np.array_equal(found.images, images)
