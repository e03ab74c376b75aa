import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_config_reference_is_not_stale():
    made = runpy.run_path(str(DOCS / "make_config_reference.py"))["text"]()
    assert (DOCS / "config.md").read_text(encoding="utf-8") == made, (
        "run: python docs/make_config_reference.py"
    )
