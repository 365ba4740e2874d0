"""What callers of this package pass, looked at before any work: one sentence for what cannot be meant."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params, init, unstack
from jaxlm.model.weights import path_of
from jaxlm.sample.arguments import check_count


def tokens(values: Any, convert: Callable[[Any], Any] = jnp.asarray) -> Any:
    """An array int[B, T] by `convert`; from its shape and type alone, so tracers will do."""
    found = _whole_numbers("tokens", values, convert)
    if found.ndim != 2:
        raise InputError(f"tokens: expected [B, T], found shape {found.shape}; a single text is tokens[None].")
    return found


def by_token(name: str, values: Any, shape: tuple[int, ...]) -> Any:
    """A jax array of whole numbers with the tokens' shape, or None as it is; tracers will do."""
    if values is None:
        return None
    found = _whole_numbers(name, values, jnp.asarray)
    if found.shape != shape:
        raise InputError(f"{name}: expected one for each token, shape {shape}, found {found.shape}.")
    return found


def in_vocabulary(cfg: ModelConfig, values: Any) -> None:
    """Tokens that the model has; of a tracer nothing is known."""
    if isinstance(values, jax.core.Tracer) or not values.size:
        return
    ids = np.asarray(values)
    if (wrong := ids[(ids < 0) | (ids >= cfg.vocab_size)]).size:
        raise InputError(
            f"tokens: id {wrong[0]} is outside the vocabulary of {cfg.vocab_size} tokens; encode the text with the "
            "model's own tokenizer."
        )


def config(cfg: Any) -> None:
    if not isinstance(cfg, ModelConfig):
        raise InputError(f"cfg: expected a ModelConfig, found {cfg!r}; jaxlm.preset(name) makes one.")


def _whole_numbers(name: str, values: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        found = convert(values)
    except (TypeError, ValueError, OverflowError):  # texts, objects, rows of several lengths
        raise InputError(
            f"{name}: expected an array of whole numbers, found others or rows of several lengths; pad the rows."
        ) from None
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise InputError(f"{name}: expected whole numbers, found {found.dtype}; convert with .astype('int32').")
    return found


def params(cfg: ModelConfig, given: Params) -> None:
    """Every weight has the shape that the configuration gives it; tracers will do."""
    paths = jax.tree_util.tree_flatten_with_path(given)[0]
    sizes = {path_of(path): jnp.shape(leaf) for path, leaf in paths}
    form: Literal["stacked", "unstacked", "prepared"] = "stacked"
    if isinstance(given, dict) and isinstance(given.get("blocks"), tuple):
        form = "prepared" if any(path.endswith("/turned") for path in sizes) else "unstacked"
    expected = _sizes(cfg, form)
    for path in {**expected, **sizes}:
        asked, found = (list(of[path]) if path in of else "no such weight" for of in (expected, sizes))
        if asked != found:
            raise InputError(
                f"params: {path}: found {found}, but the configuration has {asked}; give the configuration and the "
                "parameters of one model."
            )


@lru_cache(maxsize=64)
def _sizes(cfg: ModelConfig, form: Literal["stacked", "unstacked", "prepared"]) -> dict[str, tuple[int, ...]]:
    from jaxlm.sample import prepare

    def make() -> Params:
        made = init(cfg, jax.random.key(0))
        if form == "unstacked":
            return {**made, "blocks": unstack(made["blocks"], cfg.n_layers)}
        return prepare(cfg, made) if form == "prepared" else made

    paths = jax.tree_util.tree_flatten_with_path(jax.eval_shape(make))[0]
    return {path_of(path): leaf.shape for path, leaf in paths}


def numbers(name: str, values: ArrayLike) -> NDArray[Any]:
    """A numpy array of finite numbers, of the type that the values have."""
    found = real(name, values, hint="give labels as integers")
    if bad := int((~np.isfinite(found)).sum()):
        raise InputError(
            f"{name}: expected finite numbers, found NaN or infinity {bad} times; leave these samples out."
        )
    return found


def real(name: str, values: ArrayLike, *, hint: str = "pad or cut rows of several lengths") -> NDArray[Any]:
    """A numpy array of real numbers, of the type that the values have; they may be NaN or infinite."""
    try:
        found = np.asarray(values)
        np.isfinite(found)  # jax's small types are numbers too, which their kind does not tell
        if found.dtype.kind in "cmM":  # complex numbers, times
            raise TypeError
    except (TypeError, ValueError):  # texts, objects, rows of several lengths
        raise InputError(f"{name}: expected an array of numbers, found others; {hint}.") from None
    return found


def labels(name: str, values: ArrayLike) -> NDArray[Any]:
    """A numpy array of whole numbers, truths or texts."""
    try:
        found = np.asarray(values)
    except ValueError:  # rows of several lengths
        raise InputError(f"{name}: expected an array, found rows of several lengths.") from None
    if found.dtype.kind == "O" and all(isinstance(one, str) for one in found.ravel()):
        found = found.astype(str)
    if found.size and found.dtype.kind not in "iubU":
        raise InputError(
            f"{name}: expected whole numbers, truths or texts, found {found.dtype}; convert them, or use "
            "neighbour_information, which is for numbers."
        )
    return found


def same_length(one: str, x: NDArray[Any], other: str, y: NDArray[Any]) -> None:
    if len(x) != len(y) or not len(x):
        raise InputError(f"{one} and {other}: expected as many of both, and some, found {len(x)} and {len(y)}.")


def enough(name: str, kinds: int, groups: int) -> None:
    """What a classifier of labels, judged on groups held out, can be fitted to."""
    if kinds < 2 or groups < 4:
        raise InputError(
            f"{name}: expected at least 2 kinds in at least 4 groups, found {kinds} in {groups}; pass more."
        )


def whole(name: str, value: Any) -> int:
    """An integer of any size; `check_count` for one with a least."""
    return check_count(name, value, -sys.maxsize)


def mapping(name: str, values: Any, of: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: expected a dict, names to {of}, found {type(values).__name__}.")


def at_least(name: str, value: float, least: int) -> None:
    if not value >= least:  # so that NaN is refused too
        raise InputError(f"{name}: must be at least {least}, found {value}.")
