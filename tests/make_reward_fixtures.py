"""Write smart_grpo_jax/rewards/fixtures: what `--mode=rewards --check` compares our rewards with.

    python tests/make_reward_fixtures.py

Tiny random checkpoints in the published layouts, four pictures, and the scores that the originals' code gives
them in float64 (torch, transformers and Pillow are needed for this, and for nothing else).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tiny_rewards as tiny
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1] / "smart_grpo_jax" / "rewards" / "fixtures"
SIZE = (64, 71)
"""Where the two crop rules differ."""

PROMPTS = [
    "a photo of a red dog",
    "two cats on the left of a blue house",
    "Café, bridge & the GREEN cat!",
    "red " * 90,
]
INNER = (16, 12, 8, 4)
"""Inner widths of the heads: a published head would be 0.7 MB."""

SPREAD = 2e-4
"""Least tolerance, as a share of the scores' spread. Accelerators compute exp and erf a little differently;
the least known mistake (the other GELU in ImageReward's ViT) moves scores by several times as much."""


def pictures():
    """Eight-bit pictures: what a PNG holds is what is scored."""
    return tiny.eight_bit(tiny.pictures(*SIZE)) / np.float32(255)


def write(folder, reward, options, single, double):
    """The JSON file of one reward."""
    tolerance = max(tiny.tolerance(single, double), SPREAD * float(np.std(double)))
    rows = [
        {"image": f"../images/{i}.png", "prompt": prompt, "score": float(score)}
        for i, (prompt, score) in enumerate(zip(PROMPTS, double, strict=True))
    ]
    data = {
        "reward": reward,
        "weights": ".",
        "options": options,
        "tolerance": float(f"{tolerance:.2g}"),
        "examples": rows,
    }
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (folder / "examples.json").write_text(text + "\n", encoding="utf-8")


def image_reward(images):
    """BLIP and its head."""
    oracle = tiny.ImageRewardOracle(vision=(18, 3, 2), text=(20, 4, 2), inner=INNER)
    folder = oracle.write(ROOT / "image_reward")
    single, double = (oracle.parts(images, PROMPTS, double)[-1] for double in (False, True))
    write(folder, "image_reward", {"vision_heads": 3}, single, double)


def clips(images):
    """Every reward that is a CLIP; each folder holds all that its reward needs."""
    sizes = {"vision": (18, 3, 2), "text": (12, 2, 2), "width": 10}
    made = tiny.clips(ROOT, torch, inner=INNER, **sizes)
    for name, (reward, where, options, scores) in tiny.ORIGINALS.items():
        single, double = scores(made, images, PROMPTS)
        folder = ROOT / name.replace(" as ", "_").lower()
        if not folder.exists():
            shutil.copytree(ROOT / where, folder)
        if reward == "hps":
            options = {"vision_heads": sizes["vision"][1], "text_heads": sizes["text"][1]}
        write(folder, reward, options, single, double)
    for name in ("quick", "exact"):
        shutil.rmtree(ROOT / name)
    (ROOT / "hps" / "HPS_v2_compressed.pt").unlink()
    for head in ROOT.glob("clip_score*/*.pth"):
        head.unlink()


def main():
    """Everything anew."""
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "images").mkdir(parents=True)
    images = pictures()
    for i, image in enumerate(tiny.eight_bit(images)):
        Image.fromarray(image).save(ROOT / "images" / f"{i}.png")
    image_reward(images)
    clips(images)
    size = sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file())
    print(f"{ROOT}: {size / 1e6:.2f} MB")
    assert size < 1_000_000


if __name__ == "__main__":
    sys.exit(main())
