from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from smart_grpo_jax.runtime import compile_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def jax_config_is_put_back():
    old = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in old.items():
        jax.config.update(name, value)


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compile_cache.enable()
    assert Path(path).parent == tmp_path / "smart_grpo_jax" / "jax"
    assert jax.config.jax_compilation_cache_dir == path
    assert compile_cache.enable(tmp_path / "own") == str(tmp_path / "own")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "env"))
    assert compile_cache.enable(tmp_path / "own") == str(tmp_path / "env")


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    assert compile_cache.enable(tmp_path / "file" / "cache") is None


def test_compilations_are_counted_and_repetitions_are_not():
    square = jax.jit(lambda a: a * a)
    arrays = [jnp.zeros(n) for n in (11, 12)]
    with compile_cache.CompileCount() as count:
        square(arrays[0])
        assert count.total == 1
        square(arrays[0])
        assert count.total == 1
        square(arrays[1])
        assert count.total == 2
    assert compile_cache.CompileCount().total == 0
