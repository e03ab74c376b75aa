"""Embeddings are computed once, shared, and come back bit for bit; damage is named and never read."""

import os
import resource
import threading
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.core.types import Conditioning
from smart_grpo_jax.data import embeddings
from smart_grpo_jax.data.embeddings import Embeddings

PROMPTS = [f"prompt {i} – ünï\u0301cödé 🙂\n" for i in range(7)]


class Encoder:
    """A function of the text alone, which counts what it is asked."""

    def __init__(self, dtype=np.float32, repeats=5):
        self.asked, self.dtype, self.repeats = [], dtype, repeats

    def __call__(self, texts):
        self.asked.append(list(texts))
        rng = [np.random.default_rng(list(text.encode())) for text in texts]
        tokens = np.stack([r.standard_normal((3, 4)) for r in rng]).astype(self.dtype)
        pooled = np.stack([r.standard_normal(2) for r in rng]).astype(np.float32)
        return Conditioning(jnp.asarray(tokens), jnp.asarray(pooled), self.repeats)


def assert_rows(store, prompts, encoder):
    found, wanted = store.rows(prompts), encoder(prompts)
    assert found.tokens.dtype == wanted.tokens.dtype and found.repeats == wanted.repeats
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.pooled, wanted.pooled)


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    return tmp_path if request.param == "disk" else None


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_rows_come_back_in_any_order_and_as_often_as_asked(folder, dtype):
    encoder = Encoder(dtype)
    store = Embeddings(encoder, "f", folder, batch=3)
    assert store.ensure([*PROMPTS, *PROMPTS]) == len(PROMPTS)
    assert_rows(store, [PROMPTS[5], PROMPTS[0], PROMPTS[5]], Encoder(dtype))


def test_every_batch_has_the_same_shape_and_nothing_is_encoded_twice(folder):
    encoder = Encoder()
    store = Embeddings(encoder, "f", folder, batch=4)
    store.ensure(PROMPTS)
    assert [len(texts) for texts in encoder.asked] == [4, 4]
    assert store.ensure(PROMPTS[:3]) == 0 and len(encoder.asked) == 2


def test_another_process_finds_what_is_on_disk_and_another_encoder_does_not(tmp_path):
    Embeddings(Encoder(), "f", tmp_path, batch=3).ensure(PROMPTS)
    second, other = Encoder(), Encoder()
    store = Embeddings(second, "f", tmp_path, batch=3)
    assert store.ensure(PROMPTS) == 0 and second.asked == []
    assert_rows(store, PROMPTS[::-1], Encoder())
    assert Embeddings(other, "g", tmp_path, batch=3).ensure(PROMPTS) == len(PROMPTS)


def test_a_writer_that_died_leaves_its_whole_batches(tmp_path):
    class Dies(Encoder):
        def __call__(self, texts):
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(texts)

    with pytest.raises(KeyboardInterrupt):
        Embeddings(Dies(), "f", tmp_path, batch=3).ensure(PROMPTS)
    (tmp_path / "f" / ".half.array_record").write_bytes(b"half a file")
    store = Embeddings(Encoder(), "f", tmp_path, batch=3)
    assert store.ensure(PROMPTS) == len(PROMPTS) - 3
    assert_rows(store, PROMPTS, Encoder())


def test_an_old_temporary_is_cleaned_and_a_young_one_is_left(tmp_path):
    Embeddings(Encoder(), "f", tmp_path).ensure(PROMPTS)
    old, young = (tmp_path / "f" / f".{name}.array_record" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 2 * embeddings.STALE,) * 2)
    Embeddings(Encoder(), "f", tmp_path).ensure(PROMPTS)
    assert not old.exists() and young.exists()


def test_writers_side_by_side_do_not_disturb_each_other(tmp_path):
    stores = [Embeddings(Encoder(), "f", tmp_path, batch=2) for _ in range(4)]
    threads = [threading.Thread(target=store.ensure, args=(PROMPTS,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in [*stores, Embeddings(Encoder(), "f", tmp_path)]:
        store.ensure(PROMPTS)
        assert_rows(store, PROMPTS, Encoder())


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_part_is_named_and_encoded_again(tmp_path, capsys, damage):
    Embeddings(Encoder(), "f", tmp_path, batch=len(PROMPTS)).ensure(PROMPTS)
    (part,) = (tmp_path / "f").iterdir()
    data = part.read_bytes()
    part.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"x" * 500}[damage])
    store = Embeddings(Encoder(), "f", tmp_path)
    assert store.ensure(PROMPTS) > 0
    assert f"{part} is damaged" in capsys.readouterr().out
    assert_rows(store, PROMPTS, Encoder())


def test_a_flipped_bit_in_a_row_is_never_read_and_its_file_is_named(tmp_path):
    Embeddings(Encoder(), "f", tmp_path, batch=len(PROMPTS)).ensure(PROMPTS)
    (part,) = (tmp_path / "f").iterdir()
    data = bytearray(part.read_bytes())
    at = data.find(Encoder()([PROMPTS[2]]).pooled.__array__().tobytes())
    assert at > 0
    data[at] ^= 1
    part.write_bytes(data)
    store = Embeddings(Encoder(), "f", tmp_path)
    assert store.ensure(PROMPTS) == 0
    assert_rows(store, PROMPTS[3:], Encoder())
    with pytest.raises(StorageError, match=r"is damaged .* remove it") as caught:
        store.rows(PROMPTS)
    assert str(part) in str(caught.value)


def test_after_release_a_prompt_that_was_not_embedded_is_one_line(folder):
    store = Embeddings(Encoder(), "f", folder)
    store.ensure(PROMPTS[:2])
    store.release()
    assert_rows(store, PROMPTS[:2], Encoder())
    with pytest.raises(UserError, match="released"):
        store.ensure(PROMPTS)
    with pytest.raises(UserError, match="was not among"):
        store.rows(PROMPTS[2:3])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        Embeddings(Encoder(), "f", tmp_path / "file").ensure(PROMPTS)


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    soft, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))  # smaller than any part
    try:
        with pytest.raises(StorageError, match="could not be written") as error:
            Embeddings(Encoder(), "f", tmp_path).ensure(PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, most))
    assert "\n" not in error.value.line and not list((tmp_path / "f").iterdir())


def test_nan_and_signed_zero_keep_their_bits(tmp_path):
    bits = np.array([0x7F800001, 0xFFC12345, 0x80000000, 1], np.uint32)

    def encode(texts):
        rows = np.broadcast_to(bits.view(np.float32), (len(texts), 3, 4))
        return Conditioning(rows, rows[:, 0], 1)

    Embeddings(encode, "f", tmp_path).ensure(PROMPTS)
    store = Embeddings(encode, "f", tmp_path)
    store.ensure(PROMPTS)
    store.release()
    found = store.rows(PROMPTS[:2])
    assert (found.tokens.view(np.uint32) == bits).all() and (found.pooled.view(np.uint32) == bits).all()


def test_prompts_that_look_alike_are_told_apart(tmp_path):
    alike = ["caf\u00e9", "cafe\u0301", "cafe", "cafe ", "", "\ud800", "\x00", "a" * 100_000]

    def encode(texts):
        rows = np.array([[[float(alike.index(text))]] for text in texts], np.float32)
        return Conditioning(rows, rows[:, 0], 1)

    Embeddings(encode, "f", tmp_path, batch=3).ensure(alike)
    store = Embeddings(encode, "f", tmp_path)
    assert store.ensure(alike) == 0
    assert store.rows(alike).pooled[:, 0].tolist() == list(range(8))


def test_processes_begin_apart_and_skip_what_the_others_did(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings.jax, "process_count", lambda: 2)
    monkeypatch.setattr(embeddings.jax, "process_index", lambda: 1)

    class Meets(Encoder):
        """Beside it, another process writes the first four prompts."""

        def __call__(self, texts):
            if not self.asked:
                Embeddings(Encoder(), "f", tmp_path, batch=4).ensure(PROMPTS[:4])
            return super().__call__(texts)

    encoder = Meets()
    store = Embeddings(encoder, "f", tmp_path, batch=2)
    assert store.ensure(PROMPTS) == 4  # 3 to 6, of which the other had one
    assert encoder.asked[0] == PROMPTS[3:5]
    assert_rows(store, PROMPTS, Encoder())


def test_without_the_library_one_line_says_what_to_set(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(embeddings.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"prompts\.cache: .* wanted off"):
        Embeddings(Encoder(), "f", tmp_path).ensure(PROMPTS)
    assert Embeddings(Encoder(), "f", None).ensure(PROMPTS) == len(PROMPTS)
