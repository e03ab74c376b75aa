"""Low-rank adapters: frozen kernels in the collection 'params', trainable float32 factors in 'lora'.

    y = W x + (alpha/rank)·b(a x)        a [in, rank] ~ N(0, 1/rank²),  b [rank, out] = 0 at the start

The adapter off is the reference policy: the same network with rank 0, or with b = 0.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import PyTree
from smart_grpo_jax.models.initializers import LECUN, ZEROS

SD3_TARGETS: tuple[str, ...] = (
    r"/attn/to_q$",
    r"/attn/to_k$",
    r"/attn/to_v$",
    r"/attn/to_out_0$",
    r"/attn/add_q_proj$",
    r"/attn/add_k_proj$",
    r"/attn/add_v_proj$",
    r"/attn/to_add_out$",
)
"""The modules that flow_grpo adapts in SD3: the joint attention, not attn2."""

FLUX_TARGETS: tuple[str, ...] = (
    *SD3_TARGETS,
    r"/ff/net_0/proj$",
    r"/ff/net_2$",
    r"/ff_context/net_0/proj$",
    r"/ff_context/net_2$",
)
"""In FLUX the feed-forward layers of the double blocks as well; "attn" there matches the single blocks'
queries, keys and values, too."""


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which modules carry an adapter (regexes searched in the module path), its rank and its alpha."""

    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = SD3_TARGETS

    @property
    def scale(self) -> float:
        """alpha/rank, the factor of b(a x); 0 without an adapter."""
        return self.alpha / self.rank if self.rank else 0.0

    def adapts(self, path: Sequence[str]) -> bool:
        """True where the module at `path` carries an adapter."""
        name = "/" + "/".join(path)
        return self.rank > 0 and any(re.search(target, name) for target in self.targets)


AtUse = Callable[[str, Array], Array]
"""at_use(path, leaf) → the leaf as a product wants it: gathered, where a mesh spreads it at rest."""


def as_is(path: str, leaf: Array) -> Array:
    """One device: the leaf itself."""
    del path
    return leaf


class LoRADense(nn.Module):
    """A dense layer; with an adapter where `lora` says so. Rank 0 creates and reads no 'lora'."""

    features: int
    lora: LoRA = LoRA()
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = LECUN
    at_use: AtUse = as_is

    @nn.compact
    def __call__(self, x: Float[Array, "*b n"]) -> Float[Array, "*b f"]:
        """W x + bias + (alpha/rank)·b(a x), in the compute dtype."""
        x = x.astype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x @ self.at_use("/".join((*self.path, "kernel")), kernel.astype(self.dtype))
        if self.use_bias:
            y = y + self.param("bias", ZEROS, (self.features,)).astype(self.dtype)
        if self.lora.adapts(self.path):
            rank = self.lora.rank
            a = self.variable("lora", "a", jnp.zeros, (x.shape[-1], rank)).value
            b = self.variable("lora", "b", jnp.zeros, (rank, self.features)).value
            y = y + (x @ a.astype(self.dtype)) @ b.astype(self.dtype) * self.lora.scale
        return y


def init_lora(key: Array, module: nn.Module, lora: LoRA, *inputs: Any) -> PyTree:
    """Fresh adapters of `module` for inputs of these shapes; the base is never materialised.

    The key of a factor is the run's key folded with its path, so that an adapter does not depend on
    which other modules are adapted. Each target must match a module.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    found = cast(dict[tuple[str, ...], Any], flatten_dict(shapes.get("lora", {})))
    modules = {"/" + "/".join(path[:-1]) for path in flatten_dict(shapes["params"])}
    for target in lora.targets:
        if not any(re.search(target, name) for name in modules):
            raise UserError(f"adapter.targets: {target!r} matches no module of {type(module).__name__}")

    def fresh(path: tuple[str, ...], shape: tuple[int, ...]) -> Array:
        if path[-1] == "b":
            return jnp.zeros(shape)
        stream = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()) & 0x7FFFFFFF)
        return jax.random.normal(stream, shape) / lora.rank

    return unflatten_dict({path: fresh(path, leaf.shape) for path, leaf in found.items()})


def folded(
    kernel: Float[Array, "*l n f"], a: Float[Array, "*l n r"], b: Float[Array, "*l r f"], scale: float
) -> Float[Array, "*l n f"]:
    """kernel + scale·a b in float32, whatever an accelerator multiplies in by default."""
    delta = jnp.einsum("...ir,...ro->...io", a, b, precision="highest")
    return kernel.astype(jnp.float32) + scale * delta


def merge(base: PyTree, lora: PyTree, scale: float) -> PyTree:
    """The base with the adapters folded in: kernel + scale·a b, summed in float32, in the base's dtype."""
    kernels = cast(dict[tuple[str, ...], Any], flatten_dict(base))
    factors = cast(dict[tuple[str, ...], Any], flatten_dict(lora))
    for path in {path[:-1] for path in factors}:
        kernel = kernels[(*path, "kernel")]
        whole = folded(kernel, factors[(*path, "a")], factors[(*path, "b")], scale)
        kernels[(*path, "kernel")] = whole.astype(kernel.dtype)
    return unflatten_dict(kernels)
