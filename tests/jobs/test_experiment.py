"""The runner of experiments: what it runs, skips, takes up, tells, and how two of them share a list."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import PleaseRestart, UserError
from smart_grpo_jax.jobs import compare_runs, experiment, experiment_list
from smart_grpo_jax.jobs.experiment import Clock
from smart_grpo_jax.runtime.run_folder import take_lock
from tests.jobs.made_runs import made
from tests.jobs.tiny_run import environment, one_layer

FILE = """
from smart_grpo_jax.core.experiments import Arm, Experiment

EXPERIMENT = Experiment(
    question="Does it matter?",
    against="plain",
    seeds=2,
    common={{{common}}},
    epochs={{"shapes": 4}},
    arms={{
        "plain": Arm(),
        "noisy": Arm({{"sampler.noise_level": 0.8}}),
        "base": Arm(longer=0),
        "large": Arm(sizes=("sd35",)),
    }},
)
get_config = EXPERIMENT.get_config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trial.py"
    path.write_text(FILE.format(common=""))
    return path


def listed(file, work, seeds=(0, 1), overrides=()):
    return experiment_list.lines(
        experiment_list.read(str(file)), "trial", "shapes", list(seeds), work, list(overrides)
    )


def finish(line):
    """What a training leaves, made at once."""
    target = line.folder
    scratch = target.parent / f"made{line.seed}"
    epochs = (0, line.config.train.epochs) if line.config.train.epochs else (0,)
    made(scratch, seed=line.seed, epochs=epochs, gain=line.config.sampler.noise_level / 4)
    (scratch / "config.json").write_text(json.dumps(configs.to_dict(line.config)))
    for path in sorted(scratch.rglob("*")):
        if path.is_file():
            goal = target / path.relative_to(scratch)
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(path.read_bytes())


class Trainer:
    """In the place of the processes: finishes runs at once, fails or asks for a restart where told to."""

    def __init__(self, monkeypatch, lines, codes=None):
        self.lines = {str(line.folder): line for line in lines}
        self.codes, self.ran = dict(codes or {}), []
        monkeypatch.setattr(experiment, "Worker", lambda: contextlib.nullcontext(self))

    def run(self, folder, argv):
        line = self.lines[str(folder)]
        self.ran.append(line.name)
        left = self.codes.get(line.name, [])
        code = left.pop(0) if left else 0
        if code == 0:
            finish(line)
        else:
            (folder / "log.txt").write_text("loading\nit broke\n")
        return code

    def line(self, line):
        return self.run(line.folder, [])


def test_the_list_goes_seed_by_seed_and_what_is_not_trained_has_one(file, tmp_path):
    assert [line.name for line in listed(file, tmp_path)] == [
        *("plain, seed 0", "noisy, seed 0", "base, seed 0", "plain, seed 1", "noisy, seed 1"),
    ]


def test_some_arms_can_be_asked_for_and_an_unknown_one_is_a_mistake(file, tmp_path, capsys):
    argv = ["--mode=experiment", f"--config={file}", f"--workdir={tmp_path}", "--dry-run"]
    assert entry.main([*argv, "--arms=noisy,base"]) == 0
    said = capsys.readouterr().out
    assert "noisy" in said and "\nplain" not in said and "3 runs" in said
    assert entry.main([*argv, "--arms=nosy"]) == 2
    assert 'try "noisy"' in capsys.readouterr().err


def test_equal_lines_of_two_experiments_are_one_run_and_other_settings_another(file, tmp_path):
    lines = listed(file, tmp_path)
    again = experiment_list.lines(experiment_list.read(str(file)), "other", "shapes", [0], tmp_path)
    assert again[0].folder == lines[0].folder and again[0].link != lines[0].link
    changed = listed(file, tmp_path, overrides=[("train.learning_rate", "0.001")])
    assert changed[0].folder != lines[0].folder
    quiet = listed(file, tmp_path, overrides=[("log.samples", "5")])
    assert quiet[0].folder == lines[0].folder


def test_all_is_run_then_compared_and_the_second_time_nothing_is_run(file, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    trainer = Trainer(monkeypatch, listed(file, work, seeds=(0, 1, 2)) + listed(file, work, seeds=(10,)))
    argv = ["--mode=experiment", f"--config={file}", f"--workdir={work}"]
    assert entry.main([*argv, "--dry-run"]) == 0
    assert "2 to do" in capsys.readouterr().out and not trainer.ran and not work.exists()
    assert entry.main(argv) == 0
    assert len(trainer.ran) == 5
    said = capsys.readouterr().out
    assert "time unknown" in said and "left" in said and "against plain" in said
    stored = json.loads((work / "trial" / "compare.json").read_text())
    assert [arm["name"] for arm in stored["arms"]] == ["plain", "noisy", "base"]
    assert [arm["seeds"] for arm in stored["arms"]] == [[0, 1], [0, 1], [0]]
    assert stored["arms"][2]["picture"] == 20
    assert (work / "trial" / "noisy" / "seed1" / "metrics.jsonl").is_file()
    assert entry.main(argv) == 0 and len(trainer.ran) == 5
    assert "2 finished" in capsys.readouterr().out
    assert entry.main([*argv, "--seeds=3"]) == 0 and len(trainer.ran) == 7
    assert entry.main([*argv, "--seed=10", "--seeds=1"]) == 0 and len(trainer.ran) == 10


def test_a_results_file_stands_for_its_runs_and_takes_the_new_ones(file, tmp_path, monkeypatch, capsys):
    """What was run on another machine is not run again, also after an arm was given another name."""
    here, there = tmp_path / "here", tmp_path / "there"
    lines = listed(file, there) + listed(file, here, seeds=(0, 1, 2))
    trainer = Trainer(monkeypatch, lines)
    argv = ["--mode=experiment", f"--config={file}", f"--results={tmp_path / 'kept.jsonl'}"]
    assert entry.main([*argv, f"--workdir={there}"]) == 0 and len(trainer.ran) == 5
    file.write_text(FILE.format(common="").replace('"noisy"', '"loud"'))
    assert entry.main([*argv, f"--workdir={here}", "--dry-run", "--seeds=3"]) == 0
    said = capsys.readouterr().out
    assert "2 finished, 1 to do" in said and "1 finished" in said
    trainer.lines |= {str(line.folder): line for line in listed(file, here, seeds=(2,))}
    assert entry.main([*argv, f"--workdir={here}", "--seeds=3"]) == 0
    assert trainer.ran[5:] == ["plain, seed 2", "loud, seed 2"]
    arms = compare_runs.load([str(tmp_path / "kept.jsonl")])
    assert {arm.name: arm.seeds for arm in arms} == {"plain": [0, 1, 2], "loud": [0, 1, 2], "base": [0]}


def test_a_failure_is_told_at_the_end_and_does_not_end_the_others(file, tmp_path, monkeypatch, capsys):
    trainer = Trainer(monkeypatch, listed(file, tmp_path), {"noisy, seed 0": [4]})
    assert entry.main(["--mode=experiment", f"--config={file}", f"--workdir={tmp_path}"]) == 2
    assert len(trainer.ran) == 5
    said = capsys.readouterr()
    assert "1 of 5 runs failed: noisy, seed 0: exit 4, it broke" in said.err
    assert (tmp_path / "trial" / "compare.html").is_file()


def test_a_run_that_asks_for_it_is_started_again_but_not_for_ever(file, tmp_path, monkeypatch):
    lines = listed(file, tmp_path)[:2]
    trainer = Trainer(monkeypatch, lines, {"plain, seed 0": [75, 75], "noisy, seed 0": [75, 75, 75, 75]})
    failures = experiment.work(lines, Clock(compare_runs.UNWEIGHTED), trainer.line)
    assert trainer.ran == ["plain, seed 0"] * 3 + ["noisy, seed 0"] * 3
    assert len(failures) == 1 and "exit 75" in failures[0]


def test_what_another_works_on_is_left_to_it_and_waited_for(file, tmp_path, monkeypatch):
    lines = listed(file, tmp_path)[:2]
    trainer = Trainer(monkeypatch, lines)
    lines[0].folder.mkdir(parents=True)
    other = take_lock(lines[0].folder / "RUNNER", ["another"])
    slept = []

    def wait(seconds):
        slept.append(seconds)
        finish(lines[0])

    monkeypatch.setattr(experiment.time, "sleep", wait)
    assert experiment.work(lines, Clock(compare_runs.UNWEIGHTED), trainer.line) == []
    os.close(other)
    assert trainer.ran == ["noisy, seed 0"] and len(slept) == 1


def test_a_run_is_asked_for_as_a_user_would_type_it(file, tmp_path):
    line = listed(file, tmp_path, overrides=[("train.epochs", "3")])[1]
    flags = entry.parse(experiment.arguments(str(file), line, [("train.epochs", "3")]), entry.MODES)
    config = entry.load_config(flags)
    assert (config.seed, config.train.epochs, config.sampler.noise_level) == (0, 3, 0.8)
    assert flags.workdir == str(line.folder)
    base = listed(file, tmp_path, overrides=[("train.epochs", "3")])[2]
    argv = experiment.arguments(str(file), base, [("train.epochs", "3")])
    assert entry.load_config(entry.parse(argv, entry.MODES)).train.epochs == 0


def test_commands_share_a_process_until_one_of_them_fails(tmp_path):
    def said():
        return (tmp_path / "log.txt").read_text()

    with experiment.Worker() as worker:
        assert worker.run(tmp_path, ["--help"]) == 0 and "modes:" in said()
        first = worker._process.pid
        assert worker.run(tmp_path, ["--help"]) == 0 and said().count("modes:") == 2
        assert worker._process.pid == first
        assert worker.run(tmp_path, ["--mode=trian"]) == 2
        assert said().count("\n") > 2 and said().splitlines()[-1].startswith("--mode")
        assert worker._process is None
        assert worker.run(tmp_path, ["--help"]) == 0 and worker._process.pid != first


def test_a_process_that_dies_is_a_failure_of_its_run_and_the_next_has_another(tmp_path):
    dies = "import os, sys; sys.stdin.readline(); os._exit(77)"
    with experiment.Worker([sys.executable, "-c", dies]) as worker:
        assert [worker.run(tmp_path, []) for _ in range(2)] == [77, 77]


def test_an_interruption_reaches_the_run_and_is_waited_for(tmp_path):
    script = """
import json, signal, sys, time
log = open(json.loads(sys.stdin.readline())["log"], "w", buffering=1)
signal.signal(15, lambda *a: (print("saved", file=log), sys.exit(75)))
print("up", file=log)
time.sleep(60)
"""
    code = f"""
import sys
from pathlib import Path
from smart_grpo_jax.core.errors import PleaseRestart
from smart_grpo_jax.jobs import experiment
try:
    with experiment.interruptible(), experiment.Worker([sys.executable, "-c", {script!r}]) as worker:
        worker.run(Path({str(tmp_path)!r}), [])
except PleaseRestart as error:
    print(error)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment()
    )
    log = tmp_path / "log.txt"
    deadline = time.monotonic() + 60
    while not (log.is_file() and "up" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(signal.SIGTERM)
    said, _ = parent.communicate(timeout=60)
    assert "goes on where it stopped" in said and "saved" in log.read_text()


def test_the_time_left_is_the_cost_left_at_the_pace_so_far(file, tmp_path):
    lines = listed(file, tmp_path)
    clock = Clock(compare_runs.UNWEIGHTED)
    assert "unknown" in clock.left(lines)
    clock.add(lines[0], 0.5, 100.0)
    assert clock.left([lines[0]]) == "about 3m 20s left"


def test_the_price_of_a_run_is_what_training_will_count(tmp_path):
    config = configs.from_dict(
        experiment_list.read("configs/paper/half_searched.py").get_config("best_of_4,shapes")
    )
    found = experiment_list.price(config)
    # 6 × 12 images: ten steps; half of them tried 4 candidates at two; four passes of 2 forwards each
    epoch = 72 * 10 + 36 * 2 * 4 + 72 * 4 * 2
    assert found["training"]["velocity"] == config.train.epochs * epoch
    assert found["training"]["decode"] == config.train.epochs * (72 + 36 * 8)
    assert found["picture"] == {"velocity": 20, "backward": 0, "decode": 1, "reward": 1}
    searched = experiment_list.read("configs/paper/sampling.py").get_config("early_5x5,shapes")
    picture = experiment_list.price(configs.from_dict(searched))["picture"]
    assert picture["decode"] > 25 and (picture["decode"] - 1) % 25 == 0
    further = experiment_list.read("configs/paper/sampling.py").get_config("early_8x1_look_4,shapes")
    picture = experiment_list.price(configs.from_dict(further))["picture"]
    assert picture["velocity"] == 10 + (picture["decode"] - 1) * 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"from {configs.__name__} import default as get_config", "has no EXPERIMENT"),
        ("1 / 0", "ZeroDivisionError"),
        (None, "no file"),
    ],
)
def test_a_file_that_is_no_experiment_is_one_line(text, says, tmp_path, capsys):
    path = tmp_path / "some.py"
    if text is not None:
        path.write_text(text)
    assert entry.main(["--mode=experiment", f"--config={path}"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert entry.main(["--mode=experiment"]) == 2


def test_a_folder_in_the_way_of_a_link_is_one_line_and_a_changed_line_gets_a_new_link(file, tmp_path):
    line = listed(file, tmp_path)[0]
    assert experiment_list.join(line) == tmp_path / "trial" / "plain" / "seed0"
    changed = listed(file, tmp_path, overrides=[("train.clip", "0.5")])[0]
    experiment_list.join(changed)
    assert (tmp_path / "trial" / "plain").resolve() == changed.folder.parent
    in_the_way = listed(file, tmp_path / "b")[0]
    in_the_way.link.mkdir(parents=True)
    with pytest.raises(UserError, match="in the way"):
        experiment_list.join(in_the_way)


@pytest.mark.slow
def test_two_runners_share_a_list_of_real_trainings(tmp_path):
    small = {
        "model.path": str(one_layer()), "prompts.cache": "off", "prompts.groups": 2, "prompts.members": 4,
        "sampler.steps": 4, "sampler.eval_steps": 4, "eval.prompts": 8, "log.samples": 4,
        "train.check_rewards": False, "eval.every": 1, "checkpoint.every": 1,
    }  # fmt: skip
    path = tmp_path / "trial.py"
    path.write_text(FILE.format(common=repr(small)[1:-1]).replace('"shapes": 4', '"shapes": 2'))
    argv = [sys.executable, "-m", "smart_grpo_jax.main", "--mode=experiment", f"--config={path}"]
    runners = [
        subprocess.Popen([*argv, f"--workdir={tmp_path}", "--seeds=1"], env=environment(), cwd=Path.cwd())
        for _ in range(2)
    ]
    assert [runner.wait(timeout=900) for runner in runners] == [0, 0]
    stored = json.loads((tmp_path / "trial" / "compare.json").read_text())
    assert [arm["epochs"] for arm in stored["arms"]] == [2, 2, 0]
    starts = [path.read_text().count("\n") for path in tmp_path.glob("runs/*/seed0/command.txt")]
    assert starts == [1, 1, 1]
    assert PleaseRestart.exit_code == experiment.RESTART
