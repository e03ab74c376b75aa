"""A run that was saved on some devices is taken up on others: the same state, prompts, noise and learning.

Every place (a number of devices and a mesh) first runs undisturbed to the end, keeping the checkpoint of
epoch SAVED; then every other place takes that up and goes on. Two processes per place, so that its programs
are compiled once.
"""

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

SAVED, EPOCHS, UPDATES = 1, 6, 4
"""20 optimizer steps lie between the checkpoint and the end."""

PROBE = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
import jax
from smart_grpo_jax import main
from smart_grpo_jax.jobs import train
from smart_grpo_jax.runtime import distributed, manifest

digest = lambda a: hashlib.sha256(np.asarray(a).tobytes()).hexdigest()
begin, act, learn = train.begin, train.act, train.learn
seen = {}

def look_at_begin(*given):
    loop = begin(*given)
    seen.update(epoch=loop.epoch, state=manifest.state_hash(loop.state), drawn=[], learned=[])
    return loop

def look_at_act(loop, programs):
    acted, masks, batch = act(loop, programs)
    whole = distributed.whole
    groups = int(masks.real.sum())  # what fills the mesh comes last
    images = groups * acted.reward.shape[0] // len(masks.real)
    seen["drawn"].append([digest(whole(batch.prompt_id)[:groups]), digest(whole(acted.x[0])[:images])])
    seen.setdefault("reward", []).append(float(np.mean(whole(acted.reward)[:images])))
    return acted, masks, batch

def look_at_learn(loop, *given):
    learn(loop, *given)
    leaves = jax.tree.leaves(distributed.whole(loop.state.params))
    seen["learned"].append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    seen.setdefault("loss", []).append(loop.pending["update/loss"])
    seen["end"] = manifest.state_hash(loop.state)

train.begin, train.act, train.learn = look_at_begin, look_at_act, look_at_learn
train.evaluation_due = lambda config, epoch: False  # a program less to compile
train.record.finish = lambda *arguments: None
for command in json.loads(sys.argv[1]):
    seen = {}
    assert main.main(command) == 0, command
    folder = Path(next(word for word in command if "--workdir" in word).partition("=")[2])
    np.save(folder / "learned.npy", np.stack(seen.pop("learned")))
    (folder / "seen.json").write_text(json.dumps(seen | {"devices": jax.device_count()}))
"""

COMMON = (
    f"train.epochs={EPOCHS}", f"train.updates_per_epoch={UPDATES}", "checkpoint.every=1",
    f"checkpoint.keep={EPOCHS + 1}", "eval.every=0", "eval.prompts=4", "train.check_rewards=false",
)  # fmt: skip

PLACES = {
    "1": (1, ()),
    "2": (2, ()),
    "4": (4, ()),
    "8": (8, ()),
    "2 x 2 x 2": (8, ("mesh.fsdp=2", "mesh.tensor=2")),
    "fsdp 4": (4, ("mesh.fsdp=4",)),
}
"""Name → devices, mesh."""

ADAPTED = "/attn/to_q$,/attn/to_k$,/attn/to_v$,/attn/to_out_0$"
LEARNED = {
    "adapters": ("adapter.kind=lora", f"adapter.targets={ADAPTED}"),
    "all weights": ("adapter.kind=full",),
}

COUNTS = ("1", "2", "4", "8")
PAIRS = [("adapters", a, b) for a in COUNTS for b in COUNTS if a != b]
PAIRS += [("adapters", a, b) for a, b in (("2 x 2 x 2", "1"), ("2", "2 x 2 x 2"))]
PAIRS += [("all weights", a, b) for a, b in (("8", "2"), ("fsdp 4", "8"), ("1", "fsdp 4"))]
SAME = [("adapters", "1", "1"), ("adapters", "8", "8"), ("all weights", "fsdp 4", "fsdp 4")]


class Runs:
    """Runs by what is learned, where it was saved, and where it was taken up; made once, when asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.undisturbed = functools.cache(self.run_undisturbed)
        self.all_taken_up = functools.cache(self.take_up_all)

    def path(self, learned, saved, taken=None):
        return self.folder / f"{learned}, {saved}" / (taken or "undisturbed") / "run"

    def command(self, path, learned, place):
        path.parent.mkdir(parents=True, exist_ok=True)
        return tiny_run.command(path, *COMMON, *LEARNED[learned], *PLACES[place][1])

    def run(self, place, commands):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, json.dumps(commands)],
            env=tiny_run.environment(JAX_NUM_CPU_DEVICES=str(PLACES[place][0])),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def run_undisturbed(self, learned, place):
        path = self.path(learned, place)
        self.run(place, [self.command(path, learned, place)])
        return Outcome(path)

    def take_up_all(self, learned, place):
        """Everything that this place takes up, one after the other in one process."""
        commands = []
        for saved in (a for kind, a, b in PAIRS + SAME if (kind, b) == (learned, place)):
            self.undisturbed(learned, saved)
            path = self.path(learned, saved, place)
            commands.append(self.command(path, learned, place))
            told = shutil.ignore_patterns("seen.json", "learned.npy")
            shutil.copytree(self.path(learned, saved), path, ignore=told)
            for epoch in tiny_run.epochs(path):
                if epoch > SAVED:
                    shutil.rmtree(path / "checkpoints" / str(epoch))
        self.run(place, commands)

    def taken_up(self, learned, saved, taken):
        self.all_taken_up(learned, taken)
        return Outcome(self.path(learned, saved, taken))


class Outcome:
    """What a run left."""

    def __init__(self, path):
        self.seen = json.loads((path / "seen.json").read_text())
        self.learned = np.load(path / "learned.npy")
        manifest = path / "checkpoints" / str(SAVED) / "manifest.json"
        self.saved_hash = json.loads(manifest.read_text())["state_hash"]

    def after(self, name, epoch=SAVED):
        """What was seen after an epoch; the first entry is that of the epoch after the start."""
        return self.seen[name][epoch - self.seen["epoch"] :]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("elsewhere"))


pytestmark = pytest.mark.slow  # every place compiles its own programs
ELSEWHERE = pytest.mark.parametrize(("learned", "saved", "taken"), PAIRS)


@ELSEWHERE
def test_the_restored_state_is_the_saved_one(runs, learned, saved, taken):
    there, here = runs.undisturbed(learned, saved), runs.taken_up(learned, saved, taken)
    assert here.seen["devices"] == PLACES[taken][0] and here.seen["epoch"] == SAVED
    assert here.seen["state"] == there.saved_hash


@ELSEWHERE
def test_prompts_and_noise_go_on_to_the_bit(runs, learned, saved, taken):
    there, here = runs.undisturbed(learned, saved), runs.taken_up(learned, saved, taken)
    assert len(here.seen["drawn"]) == EPOCHS - SAVED
    assert here.after("drawn") == there.after("drawn")


@ELSEWHERE
def test_twenty_updates_later_it_has_learned_the_same(runs, learned, saved, taken):
    there, here = runs.undisturbed(learned, saved), runs.taken_up(learned, saved, taken)
    ours, theirs = here.learned, there.learned[SAVED:]
    assert ours.shape == theirs.shape and len(ours) * UPDATES == 20
    for name in ("reward", "loss"):
        np.testing.assert_allclose(here.after(name), there.after(name), rtol=0, atol=1e-5)
    moved = np.abs(theirs[-1] - theirs[0]).max()
    assert np.abs(ours - theirs).max() <= 1e-5 < moved


@pytest.mark.parametrize(("learned", "saved", "taken"), SAME)
def test_on_the_same_mesh_it_goes_on_to_the_bit(runs, learned, saved, taken):
    there, here = runs.undisturbed(learned, saved), runs.taken_up(learned, saved, taken)
    assert here.seen["end"] == there.seen["end"]
    np.testing.assert_array_equal(here.learned, there.learned[SAVED:])
    assert here.after("loss") == there.after("loss")
