"""Checkpoints: bits in = bits out, damage is found, nothing half-written counts."""

import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.core.types import TrainState
from smart_grpo_jax.runtime import mesh as meshes
from smart_grpo_jax.runtime.checkpoint import Checkpoints, read_manifest, state_hash


def make_state(seed=0):
    params = {
        "lora": {
            "a": jax.random.normal(jax.random.key(seed), (7, 5)),
            "b": jnp.arange(4, dtype=jnp.bfloat16) + seed,
        },
        "none": jnp.zeros((0, 3)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainState(
        epoch=jnp.int32(seed),
        step=jnp.int32(2 * seed),
        params=params,
        ema=jax.tree.map(lambda a: a + 1, params),
        opt_state=optimizer.init(params),
        counters={"skipped": jnp.int32(seed)},
    )


def fill(folder, epochs, **options):
    """Checkpoints with one state per epoch; returns the hash of each."""
    hashes = {}
    with Checkpoints(folder, **{"keep": 10, "best_of": None, **options}) as checkpoints:
        for epoch in epochs:
            state = make_state(epoch)
            hashes[epoch] = state_hash(state)
            checkpoints.save(epoch, state, {"epoch": epoch}, score=-float(epoch))
    return hashes


def opened(folder, said=None, **options):
    say = (lambda text: None) if said is None else said.append
    return Checkpoints(folder, **{"keep": 10, "best_of": None, "say": say, **options})


def test_a_state_comes_back_bit_for_bit_with_its_meta(tmp_path):
    hashes = fill(tmp_path, [1, 2])
    with opened(tmp_path) as checkpoints:
        found = checkpoints.restore(make_state())
    assert found.epoch == 2
    assert found.meta == {"epoch": 2}
    assert found.state_hash == hashes[2] == state_hash(found.state)
    assert isinstance(found.state, TrainState)
    assert jax.tree.structure(found.state) == jax.tree.structure(make_state())
    for got, want in zip(jax.tree.leaves(found.state), jax.tree.leaves(make_state(2)), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_an_empty_folder_restores_to_none(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()) is None


def test_one_epoch_and_one_part_can_be_read(tmp_path):
    fill(tmp_path, [1, 2])
    with opened(tmp_path, read_only=True) as checkpoints:
        found = checkpoints.restore(make_state().params, epoch=1, part="params")
        with pytest.raises(UserError, match=r"no checkpoint of epoch 7; there are: 1, 2"):
            checkpoints.restore(make_state(), epoch=7)
    assert found.epoch == 1
    assert state_hash(found.state) == state_hash(make_state(1).params)


def test_the_hash_sees_paths_types_shapes_and_bits():
    a = {"w": jnp.zeros((2, 3))}
    assert state_hash(a) == state_hash({"w": np.zeros((2, 3), np.float32)})
    others = [
        {"v": jnp.zeros((2, 3))},
        {"w": jnp.zeros((3, 2))},
        {"w": jnp.zeros((2, 3), jnp.int32)},
        {"w": jnp.zeros((2, 3)).at[1, 2].set(-0.0)},
        {"w": jnp.zeros((2, 3)), "x": jnp.zeros(0)},
    ]
    hashes = {state_hash(tree) for tree in [a, *others]}
    assert len(hashes) == 1 + len(others)


def test_donated_buffers_do_not_reach_the_file(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a * 2 + 1, tree), donate_argnums=0)
    state = {"w": jnp.arange(50_000, dtype=jnp.float32), "b": jnp.ones((300, 100))}
    numpy_leaf = np.zeros(1000, np.float32)
    with opened(tmp_path, keep=1) as checkpoints:
        for epoch in range(10):
            whole = {**state, "host": numpy_leaf}
            want = state_hash(whole)
            checkpoints.save(epoch, whole, {})
            for _ in range(3):
                state = step(state)
            jax.block_until_ready(state)
            numpy_leaf += 1
            assert checkpoints.wait()
            found = checkpoints.restore(jax.tree.map(jnp.asarray, {**state, "host": numpy_leaf}))
            assert (found.epoch, state_hash(found.state)) == (epoch, want)


def test_the_newest_and_the_best_stay(tmp_path):
    fill(tmp_path, [1, 2, 3, 4, 5], keep=2, best_of="eval/reward")
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.list_epochs() == [1, 4, 5]
        assert checkpoints.best_epoch() == 1
    fill(tmp_path, [6, 7], keep=2, best_of=None)
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.list_epochs() == [6, 7]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


def test_a_score_that_is_not_a_number_is_no_score(tmp_path):
    with opened(tmp_path, best_of="r", keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {}, score=float("nan"))
        checkpoints.save(2, make_state(2), {}, score=0.5)
        checkpoints.save(3, make_state(3), {}, score=float("inf"))
        checkpoints.wait()
        assert checkpoints.list_epochs() == [2, 3]
        assert checkpoints.best_epoch() == 2


def flip(path):
    data = bytearray(path.read_bytes())
    if not data:
        return False
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return True


def truncate(path):
    size = path.stat().st_size
    if not size:
        return False
    with open(path, "r+b") as file:
        file.truncate(size // 2)
    return True


def delete(path):
    path.unlink()
    return True


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damage_in_any_file_is_found_and_the_one_before_is_taken(tmp_path, damage):
    hashes = fill(tmp_path / "good", [1, 2])
    newest = tmp_path / "good" / "checkpoints" / "2"
    names = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file()]
    assert len(names) >= 6
    for i, name in enumerate(names):
        run = tmp_path / f"run{i}"
        shutil.copytree(tmp_path / "good", run)
        if not damage(run / "checkpoints" / "2" / name):
            continue
        said = []
        with opened(run, said) as checkpoints:
            found = checkpoints.restore(make_state())
        assert (found.epoch, state_hash(found.state)) == (1, hashes[1]), name
        assert len(said) == 1
        assert "checkpoint 2 is damaged" in said[0]
        assert str(name) in said[0] and "2.bad-1" in said[0]
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2.bad-1"]


def test_a_file_of_another_checkpoint_is_found(tmp_path):
    fill(tmp_path, [1, 2])
    shelf = tmp_path / "checkpoints"
    shutil.copy(shelf / "1" / "_METADATA", shelf / "2" / "_METADATA")
    shutil.rmtree(shelf / "2" / "d")
    shutil.copytree(shelf / "1" / "d", shelf / "2" / "d")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()).epoch == 1


def test_wrong_numbers_in_intact_files_are_found(tmp_path):
    """Files and manifest agree, but hold another array than was saved."""
    fill(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    from smart_grpo_jax.runtime import manifest as manifests

    manifest = read_manifest(folder)
    records = manifests.records_of(manifest)
    records["params/lora/a"] = records["params/lora/a"]._replace(sha256="0" * 64)
    fields = {key: manifest[key] for key in ("epoch", "score", "score_of", "meta", "versions")}
    manifests.write_manifest(folder, records, fields)
    said = []
    with opened(tmp_path, said) as checkpoints:
        assert checkpoints.restore(make_state()).epoch == 1
    assert "params/lora/a" in said[0]


def test_where_all_are_damaged_no_run_starts_afresh(tmp_path):
    fill(tmp_path, [1, 2])
    for epoch in (1, 2):
        flip(tmp_path / "checkpoints" / str(epoch) / "_METADATA")
    for _ in range(2):  # the second start finds only folders that were set aside
        with opened(tmp_path) as checkpoints:
            with pytest.raises(StorageError, match="every checkpoint is damaged") as error:
                checkpoints.restore(make_state())
            assert error.value.exit_code == 6


def test_a_reader_of_a_live_folder_changes_nothing(tmp_path):
    fill(tmp_path, [1, 2])
    flip(tmp_path / "checkpoints" / "2" / "_METADATA")
    (tmp_path / "checkpoints" / "tmp-3").mkdir()
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(make_state()).epoch == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


def test_unfinished_writes_go_at_the_next_start_without_a_word(tmp_path):
    hashes = fill(tmp_path, [1])
    shelf = tmp_path / "checkpoints"
    shutil.copytree(shelf / "1", shelf / "tmp-2")
    (shelf / "tmp-3.orbax-checkpoint-tmp").mkdir()
    (shelf / "tmp-pruned-0").mkdir()
    (shelf / "1").rename(shelf / "1.old")  # killed between the two renames of a replacement
    said = []
    with opened(tmp_path, said) as checkpoints:
        assert checkpoints.restore(make_state()).state_hash == hashes[1]
    assert said == []
    assert [p.name for p in shelf.iterdir()] == ["1"]


def test_saving_an_epoch_again_replaces_it(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(1, make_state(5), {"again": True})
        found = checkpoints.restore(make_state())
        assert found.meta == {"again": True}
        assert found.state_hash == state_hash(make_state(5))
        assert [p.name for p in checkpoints.path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(ema={}), "ema/lora/a: stored float32[7,5], this run has no such array"),
        (lambda s: s._replace(params=s.params | {"more": jnp.zeros(2)}), "params/more: not stored"),
        (
            lambda s: s._replace(step=jnp.float32(0)),
            "step: stored int32[], this run wants float32[]",
        ),
    ],
)
def test_another_model_is_one_line_and_no_damage(tmp_path, change, message):
    fill(tmp_path, [1])
    with opened(tmp_path) as checkpoints:
        with pytest.raises(UserError) as error:
            checkpoints.restore(change(make_state()))
        assert "checkpoint 1: " + message in error.value.line
        assert checkpoints.list_epochs() == [1]


def test_a_newer_format_is_one_line_and_no_damage(tmp_path):
    fill(tmp_path, [1])
    path = tmp_path / "checkpoints" / "1" / "manifest.json"
    from smart_grpo_jax.runtime import manifest as manifests

    manifest = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(manifest | {"digest": manifests._digest(manifest)}))
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match="written by a newer") as error:
        checkpoints.restore(make_state())
    assert error.value.exit_code == 2


def test_a_failed_save_warns_leaves_nothing_and_the_third_stops(tmp_path):
    """RLIMIT_FSIZE stands in for a full disk: every write over the limit fails."""
    said = []
    big = {"w": jax.random.normal(jax.random.key(0), (200_000,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path, said) as checkpoints:
        checkpoints.save(1, big, {})
        assert checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpoints.save(2, big, {})
            assert not checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            checkpoints.save(3, big, {})
            assert checkpoints.wait()  # room again: the count starts anew
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            for epoch in (4, 5, 6):
                checkpoints.save(epoch, big, {})
            with pytest.raises(StorageError, match="3 saves in a row failed"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(said) == 3 and all("was not saved" in line for line in said)
        assert sorted(p.name for p in checkpoints.path.iterdir()) == ["1", "3"]
        checkpoints._given_up = None
        assert checkpoints.restore(big).epoch == 3


def test_a_sharded_state_moves_to_another_mesh(tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices (JAX_NUM_CPU_DEVICES=8)")
    one = meshes.make_mesh(4, 1, 1, jax.devices()[:4])
    two = meshes.make_mesh(1, 2, 2, jax.devices()[:4])
    numbers = jnp.arange(64.0).reshape(8, 8)
    state = {"w": jax.device_put(numbers, meshes.batch_sharding(one))}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=meshes.batch_sharding(two))}
        found = checkpoints.restore(like)
    assert found.state["w"].sharding == meshes.batch_sharding(two)
    assert state_hash(found.state) == state_hash(state)
