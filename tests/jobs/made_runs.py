"""Run folders as training leaves them, with scores of a known law: no model, no training."""

import io
import json

import numpy as np

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.runtime.metrics import encode

PROMPTS = 40
EPOCHS = (0, 2, 4)


def made(
    folder,
    *,
    seed=0,
    gain=0.1,
    judge_gain=None,
    spread=0.01,
    epochs=EPOCHS,
    price=100,
    images=1,
    prompts=PROMPTS,
    change=None,
):
    """A run whose score rises by `gain` to its last epoch, the more the higher `seed`'s luck (`spread`)."""
    rng = np.random.default_rng([seed, round(1000 * gain)])
    base = np.random.default_rng(7).uniform(0.3, 0.6, (prompts, images))
    luck = spread * rng.normal()
    values = configs.default()
    values.seed, values.train.epochs = seed, epochs[-1]
    for name, value in (change or {}).items():
        section, field = name.split(".")
        values[section][field] = value
    config = configs.to_dict(configs.from_dict(values))
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "env.json").write_text(json.dumps({"devices": ["0: cpu"], "cpu_count": 2}))
    rows = []
    for epoch in range(epochs[-1] + 1):
        row = {f"nfe/{n}": epoch * price for n in ("velocity", "decode", "reward")}
        row |= {"nfe/backward": epoch * 10, "wall/train_seconds": 30.0 * (epoch > 0) + 2.0 * epoch}
        if epoch in epochs:
            share = epoch / max(1, epochs[-1])
            noise = (epoch > 0) * 0.02 * rng.normal(size=base.shape)
            scores = {"reward": base + share * (gain + luck) + noise}
            scores["shapes"] = scores["reward"]
            scores["second/graded"] = (
                0.02 + base + share * ((gain if judge_gain is None else judge_gain) + luck) + noise
            )
            row |= {f"eval/{n}": float(v.mean()) for n, v in scores.items()}
            save(folder / "eval" / f"{epoch}.npz", scores, prompts)
        rows.append(encode(epoch, epoch, row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def save(path, scores, prompts):
    """An evaluation as training stores it."""
    buffer = io.BytesIO()
    texts = np.asarray([f"a photo of {i} things" for i in range(prompts)])
    named = {f"score:{n}": v.astype(np.float32) for n, v in scores.items()}
    np.savez_compressed(buffer, prompts=texts, images=np.zeros((2, 4, 4, 3), np.uint8), **named)
    path.write_bytes(buffer.getvalue())


def arm(root, name, *, seeds=range(5), **law):
    """An arm's folders."""
    return [made(root / name / f"seed{seed}", seed=seed, **law) for seed in seeds]
