"""README.md of an export: what it is, how it is loaded, what made it, what was checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smart_grpo_jax.hub.export import Check

SNIPPETS: Mapping[str, str] = {
    "lora": """import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("PATH/TO/THIS/FOLDER")  # {tensors} tensors; the scale is folded in: adapter weight 1
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]""",
    "peft": """from diffusers import {transformer}
from peft import PeftModel

net = {transformer}.from_pretrained("{base}", subfolder="transformer")
net = PeftModel.from_pretrained(net, "PATH/TO/THIS/FOLDER/peft")""",
    "full": """import torch
from diffusers import {pipeline}, {transformer}

net = {transformer}.from_pretrained("PATH/TO/THIS/FOLDER/transformer", torch_dtype=torch.bfloat16)
pipe = {pipeline}.from_pretrained("{base}", transformer=net, torch_dtype=torch.bfloat16).to("cuda")
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]""",
    "orbax": """import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore("/ABSOLUTE/PATH/TO/THIS/FOLDER/orbax/merged")""",
}


def card(
    facts: Mapping[str, Any], settings: Mapping[str, Any], checks: Sequence[Check], files: Mapping[str, str]
) -> str:
    """The model card as Markdown. `settings` fills the snippets; `files` maps a name to its sha256."""
    parts = [
        front_matter(settings),
        f"# {settings['title']}\n",
        f"{settings['method']} on `{settings['base']}`, {facts['weights']} of epoch {facts['epoch']}, "
        "trained with [smart_grpo_jax](https://arxiv.org/abs/2510.02654).\n",
        "## Loading\n",
    ]
    for check in checks:
        if check.name in SNIPPETS:
            code = SNIPPETS[check.name].format(**settings, tensors=check.tensors)
            parts.append(f"{check.name}:\n\n```python\n{code}\n```\n")
    parts += ["## What made it\n", table(facts)]
    rows = {
        f"{c.name} ({c.tensors} of {c.tensors} tensors)": (
            f"velocity within {c.difference:.1e} of the trainer's, {c.from_base:.1e} away from the base"
        )
        for c in checks
    }
    parts += ["## Read back after writing\n", table(rows)]
    parts += ["## Files\n", table({name: f"sha256 {digest}" for name, digest in files.items()})]
    return "\n".join(parts)


def front_matter(settings: Mapping[str, Any]) -> str:
    """The YAML head that model hubs read."""
    lines = [
        f"base_model: {json.dumps(settings['base'])}",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags: [reinforcement-learning, grpo, flow-matching, jax]",
    ]
    return "\n".join(["---", *lines, "---", ""])


def table(rows: Mapping[str, Any]) -> str:
    """Two columns."""
    body = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *body, ""])


def digests(root: Path) -> dict[str, str]:
    """Relative name → sha256 of every file under `root`."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            found[str(path.relative_to(root))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
