"""Draw README's pictures from a finished run: `python docs/make_images.py runs/shapes`."""

import sys
from pathlib import Path

from smart_grpo_jax.jobs import report


def main(folder: Path) -> None:
    """before_after.png and curve.svg beside this file, under images/."""
    images = Path(__file__).with_name("images")
    images.mkdir(exist_ok=True)
    report.before_after(folder).save(images / "before_after.png")
    (images / "curve.svg").write_text(report.svg_curve(folder), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
