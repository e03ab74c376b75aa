"""README.md of an export: what it is, how it is loaded, what made it, what was checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart_grpo_jax.hub.export import Check
from smart_grpo_jax.hub.locate import EMBEDDED

PAPER = "https://arxiv.org/abs/2510.02654"

SNIPPETS: Mapping[str, str] = {
    "lora": """import torch
from diffusers import {pipeline}

{base}
pipe = {pipeline}.from_pretrained(base, {absent}torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("PATH/TO/THIS/FOLDER")  # {tensors} tensors; the scale is folded in: adapter weight 1
image = pipe({call}).images[0]""",
    "peft": """from diffusers import {transformer}
from peft import PeftModel

{base}
net = {transformer}.from_pretrained(base, subfolder="transformer")
net = PeftModel.from_pretrained(net, "PATH/TO/THIS/FOLDER/peft")""",
    "full": """import torch
from diffusers import {pipeline}, {transformer}

{base}
net = {transformer}.from_pretrained("PATH/TO/THIS/FOLDER/transformer", torch_dtype=torch.bfloat16)
pipe = {pipeline}.from_pretrained(base, transformer=net, {absent}torch_dtype=torch.bfloat16).to("cuda")
image = pipe({call}).images[0]""",
    "orbax": """import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore("/ABSOLUTE/PATH/TO/THIS/FOLDER/orbax/merged")""",
}

EMBEDDED_BASE = f"""from smart_grpo_jax.hub.locate import pipeline_folder

base = pipeline_folder("{EMBEDDED}")"""

EXPLAINED: Mapping[str, str] = {
    "orbax": "A nested dict of arrays named as in the published file; kernels are [in, out], layers of equal "
    "shape are stacked along their first axis. `smart_grpo_jax` takes it as it is: "
    '`load_pipeline(base).velocity_fn()({"params": params}, x, t, conditioning)`.\n'
}


def card(
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    checks: Sequence[Check],
    files: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float]] | None = None,
    remarks: Sequence[str] = (),
) -> str:
    """The model card as Markdown. `settings` fills the snippets; `files` maps a name to its sha256."""
    parts = [
        front_matter(settings["base"], any(check.name == "lora" for check in checks)),
        f"# {settings['title']}\n",
        f"{settings['method']} on `{settings['base']}`: {facts['weights']} of epoch {facts['epoch']}, "
        f"trained with smart_grpo_jax ([the paper]({PAPER})).\n",
        "## Loading\n",
    ]
    for check in checks:
        if check.name in SNIPPETS:
            parts.append(f"{check.name}:\n\n```python\n{snippet(check, settings)}\n```\n")
            parts += [EXPLAINED[check.name]] if check.name in EXPLAINED else []
    parts += ["## What made it\n", table(facts)]
    if scores:
        rows = [(name, number(row.get("base")), number(row.get("trained"))) for name, row in scores.items()]
        parts += ["## Evaluation of this epoch and of the base\n", grid(("", "base", "trained"), rows)]
    rows = {
        f"{c.name}, {c.tensors} of {c.tensors} tensors equal": (
            f"velocity within {c.difference:.1e} of the trainer's, {c.from_base:.1e} away from the base"
        )
        for c in checks
    }
    parts += ["## Read back after writing\n", table(rows), *(f"Note: {remark}.\n" for remark in remarks)]
    parts += ["## Files\n", table({name: f"sha256 {digest}" for name, digest in files.items()})]
    return "\n".join(parts)


def snippet(check: Check, settings: Mapping[str, Any]) -> str:
    """The lines of Python that load one of the forms."""
    call = ",\n".join(f"    {name}={literal(value)}" for name, value in settings["call"].items())
    return SNIPPETS[check.name].format(
        pipeline=settings["pipeline"],
        transformer=settings["transformer"],
        tensors=check.tensors,
        base=base_line(settings["base"]),
        absent="".join(f"{name}=None, " for name in settings["absent"]),
        call=f"\n{call},\n",
    )


def base_line(path: str) -> str:
    """`base = …`: a hub id or a folder; the embedded world lies inside the package."""
    if path == EMBEDDED:
        return EMBEDDED_BASE
    return f"base = {literal(path)}"


def literal(value: Any) -> str:
    """A number or a text as Python writes it, on one line."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else f"{value:g}"


def front_matter(base: str, lora: bool) -> str:
    """The YAML head that model hubs read."""
    tags = ["reinforcement-learning", "grpo", "flow-matching", "jax", *(["lora"] if lora else [])]
    lines = [
        f"base_model: {json.dumps(base)}",
        f"base_model_relation: {'adapter' if lora else 'finetune'}",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"tags: [{', '.join(tags)}]",
    ]
    return "\n".join(["---", *lines, "---", ""])


def number(value: float | None) -> str:
    """Four digits; nothing where there is none."""
    return "" if value is None else f"{value:.4g}"


def table(rows: Mapping[str, Any]) -> str:
    """Two columns."""
    return grid(("", ""), [(name, value) for name, value in rows.items()])


def grid(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a `|` in a cell is escaped and a line break is a space."""
    cell = lambda value: " ".join(str(value).replace("|", r"\|").split())
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([*(f"| {' | '.join(map(cell, line))} |" for line in lines), ""])


def digests(root: Path) -> dict[str, str]:
    """Relative name → sha256 of every file under `root`."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(root).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
