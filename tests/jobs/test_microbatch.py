"""The largest batches that a device holds, from straight lines whose answer is known."""

import dataclasses
import math

import pytest

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.jobs import microbatch, plan_slices, settle
from smart_grpo_jax.jobs.footprint import Footprint, Held, Line
from smart_grpo_jax.jobs.microbatch import Place
from smart_grpo_jax.runtime.topologies import GIB, parse
from tests.jobs import tiny_run

G = float(GIB)
AUTO = dict.fromkeys(("rollout", "decode", "reward", "chunk", "train"), -1)
PRINT = Footprint(
    frozen=Held(0.0, 4 * G), learned=Held(0.1 * G, 0.0), state=Held(0.4 * G, 0.0), fixed=Held(1 * G, 0.0),
    path=1e7, velocity=Line(0.2 * G, 0.2 * G), gradient=Line(0.2 * G, 0.5 * G), decode=Line(0.0, 0.8 * G),
    reward=Line(0.0, 0.04 * G), groups=48, members=24, searched=24, candidates=5, states=9, updates=2,
)  # fmt: skip


def config(**memory):
    values = configs.default()
    values.prompts.groups, values.prompts.members = PRINT.groups, PRINT.members
    values.memory.update(memory)
    return values


@pytest.mark.parametrize("ways", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("limit", [12, 16, 32, 95])
def test_what_is_solved_fits_and_divides_and_the_next_larger_would_not(ways, limit):
    place = Place(min(4, ways), ways, limit * G)
    found = microbatch.solve(PRINT, place, AUTO)
    room = (1 - microbatch.RESERVE) * place.limit
    rows = microbatch.rows(PRINT, place, found)
    assert PRINT.groups % found["rollout"] == 0
    assert found["train"] % PRINT.states == 0
    for name in ("decode", "reward", "chunk"):
        assert found[name] % ways == 0 or found[name] in (found["rollout"] * 24, found["chunk"] * 5)
    floor = max(microbatch.standing(PRINT, place, p) for p in ("rollout", "update")) + 9.7 * G
    if floor <= room:  # one state with all its steps is the least that a gradient can take
        assert max(microbatch.peaks(PRINT, place, found).values()) <= room
    acting = room - microbatch.standing(PRINT, place, "rollout")
    images = microbatch.call_rows(PRINT, place, found["rollout"])
    if rows.decode < images:  # with one piece less, each would be too large
        pieces = math.ceil(images / rows.decode)
        assert PRINT.decode.at(math.ceil(images / (pieces - 1))) > acting


def test_more_memory_is_never_less_at_once():
    last = dict.fromkeys(AUTO, 0)
    for limit in range(8, 128, 8):
        found = microbatch.solve(PRINT, Place(4, 16, limit * G), AUTO)
        assert all(found[name] >= last[name] for name in found)
        last = found


def test_a_given_number_stays():
    given = AUTO | {"rollout": 6, "decode": 0, "train": 36}
    found = microbatch.solve(PRINT, Place(4, 16, 16 * G), given)
    assert {name: found[name] for name in ("rollout", "decode", "train")} == {
        "rollout": 6, "decode": 0, "train": 36,
    }  # fmt: skip


def test_a_call_is_filled_up_as_training_fills_it():
    """48 groups of 24 on 256 devices: the halves of two optimizer steps divide with 64 groups, 6 rows each;
    24 groups in a call of their own with 32, 3 rows each."""
    place = Place(1, 256, 16 * G)
    assert PRINT.updates == 2 and PRINT.groups == 48
    assert [microbatch.call_rows(PRINT, place, groups) for groups in (48, 24)] == [6, 3]


def test_all_at_once_takes_what_the_pieces_say():
    """0 is one call: 1,152 images on 16 devices are 72 rows each, 576 × 9 states are 36 × 9."""
    rows = microbatch.rows(PRINT, Place(1, 16, 16 * G), dict.fromkeys(AUTO, 0))
    assert rows == microbatch.Rows(velocity=72, searched=72 * 5, decode=72, reward=72, gradient=36 * 9)


def test_halving_ends_at_one_row_on_each_device():
    numbers, seen = {"rollout": 48, "decode": 160, "reward": 16, "chunk": 48, "train": 144}, []
    while numbers not in seen:
        seen.append(numbers)
        numbers = microbatch.halved(numbers, microbatch.PHASES["rollout"], 48, 16)
    assert numbers == {"rollout": 1, "decode": 16, "reward": 16, "chunk": 16, "train": 144}
    assert [n["rollout"] for n in seen] == [48, 24, 12, 6, 3, 1]


def chosen(devices, limit, tensor=1, **changes):
    f = dataclasses.replace(PRINT, **changes)
    return microbatch.choose_parts(f, Place(tensor, devices // tensor, limit), AUTO)


def test_a_mesh_is_as_large_as_the_parameters_need():
    """5.4 GiB whole in 16; in 8 the 4 GiB of the network are cut until 1.4 + 4 / n is under a half."""
    light = PRINT.gradient._replace(slope=0.05 * G)
    assert chosen(8, 16 * G, gradient=light)[0] == 1
    parts, why = chosen(8, 8 * G, gradient=light)
    assert parts == 2 and "with fsdp 1 it were 5.4" in why
    assert chosen(12, 5 * G, gradient=light)[0] == 4
    assert chosen(8, 1 * G, gradient=light)[0] == 8


def test_a_mesh_leaves_room_for_the_smallest_pieces():
    """Beside 3.4 GiB of two devices lie 1.3 of paths, .2 of gradients and the 4.7 of one image:
    9.6 in 8 are too many by more than the reserve, with four devices they are 8.6."""
    parts, why = chosen(8, 8 * G)
    assert parts == 4 and "with fsdp 2 a phase needs about 9.6" in why
    assert chosen(16, 8 * G, tensor=2)[0] == 2
    assert chosen(8, 6 * G)[0] == 8  # nothing helps: what needs least


def test_without_a_known_device_everything_is_done_at_once_and_lies_whole():
    values = config(rollout="auto", train="auto", decode=8)
    values.mesh.fsdp = "auto"
    asked = configs.from_dict(values)
    assert microbatch.automatic(asked)
    made, why = microbatch.settle(asked, None, 8, None)
    assert (made.memory.rollout, made.memory.train, made.memory.decode, made.mesh.fsdp) == (0, 0, 8, 1)
    assert not microbatch.automatic(made) and "nobody knows" in why


def test_auto_on_the_command_line_is_auto_in_a_file():
    values = configs.default()
    for name in ("memory.rollout", "search.chunk", "mesh.fsdp"):
        configs.override(values, name, "auto")
    made = configs.from_dict(values)
    assert (made.memory.rollout, made.search.chunk, made.mesh.fsdp) == (-1, -1, 0)
    assert configs.from_dict(configs.to_dict(made)) == made
    for name, text in (("memory.rollout", "-2"), ("memory.rollout", "all"), ("train.epochs", "auto")):
        with pytest.raises(UserError, match=name):
            configs.override(values, name, text)
            configs.from_dict(values)


def test_the_estimate_names_the_smallest_slice_and_the_next_larger_one():
    """1.4 + 4 / n GiB lie there; 11 GiB more are needed for one state's nine steps, backwards."""
    asked = configs.from_dict(config(rollout="auto", decode="auto", reward="auto", train="auto"))
    asked = dataclasses.replace(
        asked,
        mesh=dataclasses.replace(asked.mesh, fsdp=0),
        search=dataclasses.replace(asked.search, chunk=-1),
    )
    light = dataclasses.replace(PRINT, gradient=Line(0.2 * G, 0.2 * G), path=1e5)
    found = plan_slices.other(asked, light, parse("v5e:4x4"), True)
    assert found is not None and found.fits and found.name == "v5e:1x1"
    heavy = dataclasses.replace(PRINT, frozen=Held(0.0, 60 * G))
    assert not plan_slices.would_fit(asked, heavy, parse("v5e:2x2"))
    above = plan_slices.other(asked, heavy, parse("v5e:2x2"), False)
    assert above is not None and above.fits and math.prod(map(int, above.name[4:].split("x"))) > 4
    assert plan_slices.other(asked, heavy, parse("2xv5e:2x2"), False) is None
    hopeless = dataclasses.replace(PRINT, fixed=Held(200 * G, 0.0))
    none = plan_slices.other(asked, hopeless, parse("v5e:2x2"), False)
    assert none is not None and not none.fits


def everything_automatic():
    values = configs.default()
    values.model.path, values.prompts.cache = str(tiny_run.one_layer()), "off"
    values.prompts.groups, values.prompts.members = 4, 4
    values.memory.update(dict.fromkeys(("rollout", "decode", "reward", "train"), "auto"))
    values.search.chunk = values.mesh.fsdp = "auto"
    return configs.from_dict(values)


def test_a_run_on_a_device_that_nobody_knows_is_all_at_once_and_says_so(capsys):
    made = settle.settled(everything_automatic())
    assert made == dataclasses.replace(
        made, memory=dataclasses.replace(made.memory, rollout=0, decode=0, reward=0, train=0)
    )
    assert made.mesh.fsdp == 1 and made.search.chunk == 0
    assert "nobody knows what a device holds" in capsys.readouterr().out
    assert settle.settled(made) is made


@pytest.mark.slow
def test_a_run_on_a_known_device_is_solved_for_it_and_says_so(monkeypatch, capsys):
    """30 MB hold a few images, 95 GB all of them."""
    monkeypatch.setattr(settle, "device_limit", lambda: 3e7)
    made = settle.settled(everything_automatic())
    assert not microbatch.automatic(made)
    assert 0 < made.memory.rollout <= 4 and made.memory.decode > 0 and made.memory.train > 0
    assert "per decode" in capsys.readouterr().out
    monkeypatch.setattr(settle, "device_limit", lambda: 95e9)
    assert settle.settled(everything_automatic()).memory.rollout == 4
