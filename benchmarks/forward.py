"""Our networks against PyTorch's in one run: `python benchmarks/forward.py`.

The same random weights on both sides (written by the weight tables), the same inputs, timed in turns in
one process; medians. Ratio = PyTorch's seconds / ours: above 1 we are faster. By default small networks
of the published shapes in float32 on the CPU, PyTorch eager. On a machine whose jax and torch see a GPU:

  python benchmarks/forward.py --preset=sd35-medium --side=512 --batch=16 --dtype=bfloat16 --compile

(16 = batch 8 with guidance). Outputs are compared as well, so that no ratio compares two different things.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from smart_grpo_jax.core.types import Conditioning
from smart_grpo_jax.hub import functions, tables
from smart_grpo_jax.hub.families import NETWORKS
from smart_grpo_jax.maths import flops
from smart_grpo_jax.models.clip import CLIPText
from smart_grpo_jax.models.presets import PRESETS
from smart_grpo_jax.models.t5 import T5Encoder
from smart_grpo_jax.runtime import compile_cache
from smart_grpo_jax.runtime.mesh import local_devices_summary

SMALL: Mapping[str, Mapping[str, Any]] = {
    "sd3": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "caption_projection_dim": 256,
        "joint_attention_dim": 512,
        "pooled_projection_dim": 256,
        "pos_embed_max_size": 32,
        "dual_attention_layers": [0, 1],
        "qk_norm": "rms_norm",
    },
    "flux": {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": 512,
        "pooled_projection_dim": 256,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 24, 24],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "clip": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "projection_dim": 256,
        "vocab_size": 1000,
        "eos_token_id": 2,
    },
    "t5": {
        "architectures": ["T5EncoderModel"],
        "d_model": 512,
        "d_ff": 1024,
        "d_kv": 64,
        "num_heads": 8,
        "num_layers": 4,
        "vocab_size": 1000,
        "feed_forward_proj": "gated-gelu",
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on both sides; each callable runs it once and gives a host array."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    flops: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and a line of JSON; 1 where the geometric mean of the ratios is below 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="small", help="small, or a preset such as sd35-medium")
    parser.add_argument("--parts", default="", help="of sd3, flux, vae, clip, t5; all that the preset has")
    parser.add_argument("--side", type=int, default=0, help="pixels; 0: 256 for small, else 1024")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--text", type=int, default=154, help="text tokens")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args(argv)
    compile_cache.enable()
    torch.set_grad_enabled(False)
    rows = [measure(case, arguments) for case in cases(arguments)]
    print(table(rows, arguments))
    mean = float(np.exp(np.mean([np.log(row["ratio"]) for row in rows])))
    print(json.dumps({"ratio": round(mean, 3), "parts": rows, **machine(arguments)}))
    return int(mean < 1)


def configs(preset: str) -> dict[str, Mapping[str, Any]]:
    """Part → published config."""
    if preset == "small":
        return dict(SMALL)
    kinds = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
    found = {}
    for component, data in PRESETS[preset].items():
        if component == "transformer":
            found[kinds[data.get("_class_name", "SD3Transformer2DModel")]] = data
        elif component == "vae":
            found["vae"] = data
        else:
            found["t5" if "d_model" in data else component.replace("text_encoder", "clip")] = data
    return found


def cases(arguments: argparse.Namespace) -> list[Case]:
    """The parts that are asked for, with weights and inputs."""
    known = configs(arguments.preset)
    wanted = [part for part in arguments.parts.split(",") if part] or list(known)
    return [BUILDERS[part](part, known[part], arguments) for part in wanted]


def sides(arguments: argparse.Namespace) -> int:
    """Latents along a side."""
    return (arguments.side or (256 if arguments.preset == "small" else 1024)) // 8


def same_weights(module: torch.nn.Module, class_name: str, config: Any, arguments: argparse.Namespace) -> Any:
    """Random weights of unit gain for the torch module, and the same as our tree."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(
            noise / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1 * noise + name.endswith("weight")
        )
    kept = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
    module.to(kept).eval()
    return tables.to_params(NETWORKS[class_name].table, config, StateDict(module), jnp.dtype(arguments.dtype))


class StateDict:
    """The tensors of a torch module as a reader of weight tables."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.state = {k: v.detach() for k, v in module.state_dict().items()}

    def keys(self) -> set[str]:
        """All keys."""
        return set(self.state)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.state[key].shape)

    def tensor(self, key: str) -> np.ndarray:
        """The tensor, float32."""
        return self.state[key].float().numpy()

    def rows(self, key: str, start: int, stop: int) -> np.ndarray:
        """Some of its rows."""
        return self.tensor(key)[start:stop]

    def file(self, key: str) -> str:
        """Where it comes from."""
        return "torch"


def on_device(module: torch.nn.Module, arguments: argparse.Namespace) -> tuple[Any, Callable[[Any], Any]]:
    """The module where it runs, and how an array gets there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = module.to(device)
    kept = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(array)).to(device)
        return tensor.to(kept) if tensor.is_floating_point() else tensor.long()

    return (torch.compile(module) if arguments.compile else module), move


def finish(tensor: torch.Tensor) -> np.ndarray:
    """The result on the host; waits for the device."""
    return tensor.float().cpu().numpy()


def transformer(part: str, data: Mapping[str, Any], arguments: argparse.Namespace) -> Case:
    """A velocity network."""
    flux = part == "flux"
    class_name = "FluxTransformer2DModel" if flux else "SD3Transformer2DModel"
    config = NETWORKS[class_name].config.from_json(data)
    module = getattr(diffusers, class_name).from_config(dict(data))
    params = {"params": same_weights(module, class_name, config, arguments)}
    rng, side, batch = np.random.default_rng(0), sides(arguments), arguments.batch
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, tokens = (
        draw(batch, side, side, config.latent_channels),
        draw(batch, arguments.text, config.joint_attention_dim),
    )
    pooled, t = draw(batch, config.pooled_projection_dim), np.full(batch, 0.5, np.float32)
    module, move = on_device(module, arguments)
    if flux:
        theirs = flux_call(module, move, x, t, tokens, pooled)
    else:
        given = [move(a) for a in (x.transpose(0, 3, 1, 2), tokens, pooled, 1000 * t)]
        theirs = lambda: finish(module(*given, return_dict=False)[0]).transpose(0, 2, 3, 1)
    raw = functions.velocity_fn(config, dtype=jnp.dtype(arguments.dtype))
    guidance = jnp.float32(3.5) if config.embeds_guidance else None
    given_ours = jax.device_put(
        (params, x, t, Conditioning(jnp.asarray(tokens), jnp.asarray(pooled)), guidance)
    )
    run = jax.jit(raw)
    return Case(part, lambda: np.asarray(run(*given_ours)), theirs, flops.count(raw, *given_ours))


def flux_call(
    module: Any, move: Any, x: np.ndarray, t: np.ndarray, tokens: np.ndarray, pooled: np.ndarray
) -> Any:
    """diffusers' FLUX takes packed latents and ids; both are made once, outside the clock."""
    batch, height, width, channels = x.shape
    packed = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    packed = packed.reshape(batch, height * width // 4, -1)
    ids = np.zeros((height // 2, width // 2, 3), np.float32)
    ids[..., 1], ids[..., 2] = np.arange(height // 2)[:, None], np.arange(width // 2)
    given = {
        "hidden_states": move(packed),
        "encoder_hidden_states": move(tokens),
        "pooled_projections": move(pooled),
        "timestep": move(t),
        "guidance": move(np.full(batch, 3.5, np.float32)),
        "img_ids": move(ids.reshape(-1, 3)),
        "txt_ids": move(np.zeros((tokens.shape[1], 3), np.float32)),
    }

    def call() -> np.ndarray:
        out = finish(module(**given, return_dict=False)[0])
        out = out.reshape(batch, height // 2, width // 2, channels, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return out.reshape(x.shape)

    return call


def decoder(part: str, data: Mapping[str, Any], arguments: argparse.Namespace) -> Case:
    """The VAE's decoder, float32 on both sides."""
    arguments = argparse.Namespace(**{**vars(arguments), "dtype": "float32"})
    config = NETWORKS["AutoencoderKL"].config.from_json(data)
    module = diffusers.AutoencoderKL.from_config(dict(data))
    params = same_weights(module, "AutoencoderKL", config, arguments)
    side = (arguments.side or (256 if arguments.preset == "small" else 1024)) // config.factor
    side = side // 4 if arguments.preset == "small" else side
    z = np.random.default_rng(0).standard_normal((arguments.batch, side, side, config.latent_channels))
    z = z.astype(np.float32)
    module, move = on_device(module, arguments)
    raw = move((z / config.scaling_factor + (config.shift_factor or 0)).transpose(0, 3, 1, 2))
    decode = functions.decode_fn(config)
    run, given = jax.jit(decode), jax.device_put((params, z))

    def theirs() -> np.ndarray:
        images = finish(module.decode(raw, return_dict=False)[0]).transpose(0, 2, 3, 1)
        return np.clip(images / 2 + 0.5, 0, 1)

    return Case(part, lambda: np.asarray(run(*given)), theirs, flops.count(decode, *given))


def encoder(part: str, data: Mapping[str, Any], arguments: argparse.Namespace) -> Case:
    """A text encoder."""
    t5 = part == "t5"
    default = "T5EncoderModel" if t5 else "CLIPTextModelWithProjection"
    class_name = data.get("architectures", [default])[0]
    data = {**data, "architectures": [class_name]}
    config = NETWORKS[class_name].config.from_json(data)
    settings = (transformers.T5Config if t5 else transformers.CLIPTextConfig)(**data)
    module = getattr(transformers, class_name)(settings)
    params = same_weights(module, class_name, config, arguments)
    length = arguments.text if t5 else 77
    ids = np.random.default_rng(0).integers(3, 900, (arguments.batch, length)).astype(np.int32)
    module, move = on_device(module, arguments)
    net = (T5Encoder if t5 else CLIPText)(config, jnp.dtype(arguments.dtype))

    def call(params: Any, ids: Any) -> Any:
        out = net.apply({"params": params}, ids)
        return out if t5 else out.last

    run, given, their_ids = jax.jit(call), jax.device_put((params, ids)), move(ids)
    theirs = lambda: finish(module(their_ids).last_hidden_state)
    return Case(part, lambda: np.asarray(run(*given)), theirs, flops.count(call, *given))


BUILDERS = {
    "sd3": transformer,
    "flux": transformer,
    "vae": decoder,
    "clip": encoder,
    "clip_2": encoder,
    "t5": encoder,
}


def measure(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of both sides, in turns, after two rounds for warming up."""
    ours, theirs = case.ours(), case.theirs()
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(arguments.repeats + 1):
        for name in seconds:
            started = time.perf_counter()
            getattr(case, name)()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    mine, other = (statistics.median(values) for values in seconds.values())
    return {
        "part": case.name,
        "ratio": round(other / mine, 3),
        "ours_ms": round(1000 * mine, 2),
        "torch_ms": round(1000 * other, 2),
        "gflop_per_second": round(case.flops / mine / 1e9, 1),
        "difference": float(f"{error:.1e}"),
    }


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "torch_mode": "compile" if arguments.compile else "eager",
        "machine": local_devices_summary(),
        "load": round(os.getloadavg()[0], 1),
        "peak_memory_gb": round(memory_peak() / 1e9, 2),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def memory_peak() -> float:
    """Bytes that jax held at most on its device; 0 where the device does not say."""
    return float((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


def table(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> str:
    """The result for a person."""
    told = machine(arguments)
    head = f"{told['preset']}, batch {told['batch']}, {told['dtype']}, torch {told['torch_mode']}"
    head = f"{head}; {told['machine']}"
    lines = [f"{'part':<8}{'ours':>12}{'torch':>12}{'ratio':>8}{'GFLOP/s':>10}{'difference':>12}"]
    for row in rows:
        lines.append(
            f"{row['part']:<8}{row['ours_ms']:>9.1f} ms{row['torch_ms']:>9.1f} ms{row['ratio']:>8.2f}"
            f"{row['gflop_per_second']:>10.0f}{row['difference']:>12.1e}"
        )
    return "\n".join([f"{head}, load {told['load']}, {told['date']}", *lines])


if __name__ == "__main__":
    sys.exit(main())
