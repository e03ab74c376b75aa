"""A reward in three lines: a function of the user's own, named in the config as `module:function`.

@reward
def redness(images):                              # jax: images [b,H,W,3] in [0,1]
    return images[..., 0].mean((1, 2))

@host_reward(batch=16, timeout=30, workers=4)
def sharp(images, prompts, metadata):             # numpy, 8 bits; texts; one dict per prompt
    return [float(image.std()) for image in images]
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smart_grpo_jax.core.config import Host
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.core.types import PyTree, Scores
from smart_grpo_jax.rewards import host
from smart_grpo_jax.rewards.base import Builder, Reward, no_prompt, nothing, without_weights


class GraphFunction:
    """A jax function of images, and of what `prepare` makes of the prompts."""

    def __init__(self, function: Callable[..., Any], prepare: Callable[[Sequence[str]], Any] | None) -> None:
        functools.update_wrapper(self, function)
        self.function, self.prepare = function, prepare

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function itself, so that a decorated one can be tried by hand."""
        return self.function(*args, **options)


class HostFunction:
    """A plain Python function of images, prompts and metadata; `limits` are those it sets for itself."""

    def __init__(self, function: Callable[..., Any], limits: Mapping[str, float]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.limits = function, dict(limits)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function itself, so that a decorated one can be tried by hand."""
        return self.function(*args, **options)


def reward(function: Callable[..., Any] | None = None, *, prepare: Callable[..., Any] | None = None) -> Any:
    """Decorator of a jittable reward: `function(images, *prepare(prompts), **options) -> [b]`.

    `prepare(prompts)` runs on the host, once, and gives an array, or a tuple of arrays, with one row per
    prompt. An argument called `t` is told the noise level: None for a finished image.
    """
    if function is None:
        return lambda function: GraphFunction(function, prepare)
    return GraphFunction(function, prepare)


def host_reward(
    function: Callable[..., Any] | None = None,
    *,
    batch: int | None = None,
    timeout: float | None = None,
    workers: int | None = None,
) -> Any:
    """Decorator of a reward in plain Python: `function(images, prompts, metadata, **options) -> floats`.

    Images are uint8 [b,H,W,3] with b ≤ `batch`; a call that takes longer than `timeout` seconds is given
    up; `workers` calls run at the same time. None in place of a score means: missing.
    """
    limits = {"batch": batch, "timeout": timeout, "workers": workers}
    given = {name: value for name, value in limits.items() if value is not None}
    if function is None:
        return lambda function: HostFunction(function, given)
    return HostFunction(function, given)


def builder(where: str) -> Builder:
    """The builder of the reward that `module:function` names: options are the function's own arguments."""
    found = find(where)
    if isinstance(found, HostFunction):
        build = functools.partial(_host, where, found)
        first, extra = ("images", "prompts", "metadata"), {"limits": found.limits}
    else:
        if not isinstance(found, GraphFunction):
            found = GraphFunction(found, None)
        build = functools.partial(_graph, where, found)
        first, extra = ("images",), {}
    signature = _signature(where, found.function, first)
    return _Builder(build, signature, **extra)


class _Builder:
    """A builder that tells the options of its function, and the limits of a host function."""

    def __init__(self, build: Builder, signature: inspect.Signature, **extra: Any) -> None:
        self.__signature__, self._build = signature, build
        self.__dict__.update(extra)

    def __call__(self, *args: Any, **options: Any) -> Reward:
        """The reward."""
        return self._build(*args, **options)


def _signature(where: str, function: Callable[..., Any], first: Sequence[str]) -> inspect.Signature:
    """The options of a function: its arguments but the ones that every call brings."""
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UserError(f"reward {where}: is not a function of {', '.join(first)}") from None
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    many = any(a.kind == a.VAR_POSITIONAL for a in arguments)
    if not many and len(positional) < len(first):
        got = ", ".join(a.name for a in arguments) or "no argument"
        raise UserError(f"reward {where}: takes {got}, want a function of {', '.join(first)}")
    options = [a for a in arguments[len(first) :] if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    return inspect.Signature([a.replace(kind=a.KEYWORD_ONLY) for a in options if a.name != "t"])


def _options(where: str, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the function's defaults type them: the command line knows floats alone."""
    arguments = inspect.signature(function).parameters
    fitted = dict(given)
    for name, value in given.items():
        if isinstance(value, float) and value.is_integer() and type(arguments[name].default) in (int, bool):
            fitted[name] = type(arguments[name].default)(value)
    return fitted


def _graph(
    where: str, found: GraphFunction, path: str | None = None, dtype: str = "float32", **given: Any
) -> Reward:
    without_weights(where, path)
    options = _options(where, found.function, given)
    timed = "t" in inspect.signature(found.function).parameters
    if found.prepare is None:
        _bind(where, found.function, (None,), options)

    def prepare(prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
        with _one_line(f"reward {where}: prepare"):
            made = found.prepare(list(prompts))  # type: ignore[misc]
            rows = tuple(map(np.asarray, made if isinstance(made, tuple) else (made,)))
        for array in rows:
            if array.dtype == object or array.ndim < 1 or len(array) != len(prompts):
                raise UserError(
                    f"reward {where}: prepare gave shape {array.shape} of {array.dtype} for {len(prompts)} "
                    "prompts, want numbers with a row per prompt"
                )
        _bind(where, found.function, (None, *rows), options)
        return rows

    def score(params: PyTree, images: Float[Array, "b H W 3"], ctx: PyTree, t: Array | None = None) -> Scores:
        level = {"t": t} if timed else {}
        with _one_line(f"reward {where}", hint=" (jax functions only; else @host_reward)"):
            value = jnp.asarray(found.function(images, *ctx, **options, **level))
        if value.shape != images.shape[:1]:
            raise UserError(
                f"reward {where}: gave shape {value.shape} for {images.shape[0]} images, want a number each"
            )
        value = value.astype(jnp.float32)
        return Scores(value, jnp.isfinite(value), {})

    if found.prepare is None:
        return Reward(where, {}, lambda prompts: (), score, uses_prompt=False)
    return Reward(where, {}, prepare, score, uses_prompt=True)


def _host(
    where: str,
    found: HostFunction,
    path: str | None = None,
    dtype: str = "float32",
    limits: Host | None = None,
    **given: Any,
) -> Reward:
    without_weights(where, path)
    options, limits = _options(where, found.function, given), limits or Host()
    _bind(where, found.function, (None, None, None), options)

    def ask(batch: host.Batch) -> list[host.Answer]:
        call = lambda: list(found.function(batch.images, batch.prompts, batch.metadata, **options))
        return [host.Answer(score) for score in host.begin(call)(limits.timeout)]

    return Reward(where, {}, no_prompt, nothing().score, uses_prompt=True, host=host.scorer(ask, limits))


def _bind(where: str, function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> None:
    signature = inspect.signature(function)
    level = {"t": None} if "t" in signature.parameters else {}
    try:
        signature.bind(*args, **{**level, **options})
    except TypeError as error:
        raise UserError(
            f"reward {where}: {error} (an option of the config, what `prepare` gives, or @host_reward)"
        ) from None


@contextlib.contextmanager
def _one_line(what: str, hint: str = "") -> Iterator[None]:
    """Whatever a user's code raises, as one line that says whose it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # jax explains over many lines; the first says what it is
        first = (str(error).strip().splitlines() or [""])[0]
        traced = hint if isinstance(error, (jax.errors.JAXTypeError, jax.errors.JAXIndexError)) else ""
        raise UserError(f"{what} raised {type(error).__name__}: {first[:90]}{traced}") from error


def find(where: str) -> Any:
    """What `module:function` or `file.py:function` names."""
    module, _, name = where.rpartition(":")
    loaded = _file(where, module) if module.endswith(".py") else _module(where, module)
    if not hasattr(loaded, name):
        own = [key for key, value in vars(loaded).items() if callable(value) and not key.startswith("_")]
        raise UserError(f'reward {where}: {module} has no "{name}" ({nearest(name, own)})')
    found = getattr(loaded, name)
    if not callable(found):
        raise UserError(f"reward {where}: is of type {type(found).__name__}, want a function")
    return found


def _module(where: str, name: str) -> types.ModuleType:
    with _from_here():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                raise UserError(f"reward {where}: no module {name} here or on the Python path") from None
            raise UserError(f"reward {where}: {name} cannot be imported: {error}") from error
        except Exception as error:
            raise _broken(where, name, error) from error


def _file(where: str, path: str) -> types.ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"reward {where}: no file {path}")
    try:
        return _executed(file, file.stat().st_mtime_ns)
    except Exception as error:
        raise _broken(where, path, error) from error


@functools.cache
def _executed(file: Path, changed: int) -> types.ModuleType:
    """The module of a file, executed once."""
    spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _broken(where: str, module: str, error: Exception) -> UserError:
    line = getattr(error, "lineno", None)
    place = f" (line {line})" if line else ""
    text = " ".join(str(error).split())[:90]
    return UserError(f"reward {where}: {module} failed on import: {type(error).__name__}: {text}{place}")


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    """The working directory is importable, wherever the program was started from."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)
