"""The package's front door: three names, imported when they are used."""

import subprocess
import sys

import pytest

import smart_grpo_jax
from smart_grpo_jax.core.types import Conditioning


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, smart_grpo_jax; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_come_from_their_homes():
    assert smart_grpo_jax.Conditioning is Conditioning
    assert set(smart_grpo_jax.__all__) == set(smart_grpo_jax.HOMES) <= set(dir(smart_grpo_jax))
    with pytest.raises(AttributeError, match='try "load_pipeline"'):
        _ = smart_grpo_jax.load_pipelines
