"""Write docs/config.md from core/config.py: `python docs/make_config_reference.py`."""

from pathlib import Path

from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.schema import reference

HEAD = """# Config reference

Made by `python docs/make_config_reference.py` from `smart_grpo_jax/core/config.py`; a test says when it is
stale.
A config file is a Python file whose `get_config()` edits `smart_grpo_jax.core.config.default()`; the command
line overrides single fields: `--config.train.epochs=60`, `--config.search.steps=1,2,3`,
`--config.rewards.shapes_aesthetic=0.5`.
"""


def text() -> str:
    """The whole page."""
    return HEAD + reference(Config)


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(text(), encoding="utf-8")
