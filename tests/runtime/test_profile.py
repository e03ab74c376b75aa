"""The trace of one epoch."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from smart_grpo_jax import main as entry
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.flags import parse
from smart_grpo_jax.runtime import distributed
from smart_grpo_jax.runtime.profile import Trace


def traced(folder, wanted, done, total, said):
    """The epochs after which there is a trace."""
    trace, found = Trace(folder, wanted, done, total, say=said.append), []
    for epoch in range(done + 1, total + 1):
        before = len(said)
        with trace.of(epoch), jax.profiler.TraceAnnotation("rollout"):
            jnp.sin(jnp.ones(3)).block_until_ready()
        if len(said) > before:
            found.append(epoch)
    return found


@pytest.mark.parametrize(
    ("wanted", "done", "total", "expected"),
    [(0, 0, 5, [3]), (0, 7, 20, [10]), (0, 0, 2, [2]), (4, 0, 5, [4]), (None, 0, 4, [])],
)
def test_one_epoch_is_traced(tmp_path, wanted, done, total, expected):
    said = []
    assert traced(tmp_path, wanted, done, total, said) == expected
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == len(expected)


def test_the_line_says_where_it_is_and_how_to_open_it(tmp_path):
    said = []
    traced(tmp_path, 1, 0, 1, said)
    (line,) = said
    assert str(tmp_path / "profile") in line and "xprof" in line and "ui.perfetto.dev" in line
    file = tmp_path / line.partition("or open ")[2].split()[0]
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "rollout" for event in events)


def test_the_main_process_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert traced(tmp_path, 1, 0, 1, []) == [] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("wanted", [3, 9])
def test_an_epoch_that_is_not_to_come_is_refused(tmp_path, wanted):
    with pytest.raises(UserError, match=rf"--profile: got {wanted}, wanted .* 4\.\.8"):
        Trace(tmp_path, wanted, 3, 8)


def test_the_flag_stands_alone_or_with_a_number():
    flags = lambda *words: parse(["--config=a.py", *words], ["train", "eval"])
    assert flags().profile is None
    assert flags("--profile").profile == 0
    assert flags("--profile", "--mode=train").profile == 0
    assert flags("--profile=7").profile == 7


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--profile=0"], '--profile: got "0"'),
        (["--profile=third"], '--profile: got "third"'),
        (["--profile="], '--profile: got ""'),
        (["--profile", "--mode=eval"], "--profile: got --mode=eval, wanted --mode=train"),
    ],
)
def test_a_mistake_is_one_line(words, hint, capsys):
    assert entry.main(["--config=configs/shapes.py", *words]) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1
