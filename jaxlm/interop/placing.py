"""Tensors of a file into our tree, and our tree as tensors of a file, one at a time.

Peak memory stays near one copy of the model: each tensor is read, written to its place in the stacked array, and
dropped before the next; on a CPU the finished array becomes a jax array without being copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxlm import model
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.interop.families import Family
from jaxlm.interop.names import Rule
from jaxlm.model.weights import path_of

Shape = tuple[int, ...]
Sharding = Callable[[str], jax.sharding.Sharding | None]

_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
_ALIGNMENT = 64  # bytes; XLA takes over a host array without copying when its start is a multiple of this


class Source(NamedTuple):
    """Tensors by name, wherever they are.

    Attributes:
        shapes: of every tensor there is, by its name.
        read: the tensor of a name, in its own floating-point type; asked in the order of the family's table.
        where: for errors: the file that holds a name, or the place as a whole for a name that is nowhere.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]
    where: Callable[[str], str]


class Wanted(NamedTuple):
    """A tensor that a model of one configuration has.

    Attributes:
        name: in the file, the layer filled in.
        rule: its row of the table.
        layer: which one, or None outside the layers.
        shape: in the file.
    """

    name: str
    rule: Rule
    layer: int | None
    shape: Shape


@lru_cache(maxsize=8)
def shapes_of(cfg: ModelConfig) -> Mapping[str, Shape]:
    """The shape of each of our weights, by its path."""
    tree = jax.eval_shape(lambda: model.init(cfg, jax.random.key(0)))
    return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def wanted(cfg: ModelConfig, family: Family) -> list[list[Wanted]]:
    """The tensors of a model: a list for each row of the family's table, with one entry a layer.

    Raises:
        InputError: a weight of the model is in no row of the table.
    """
    shapes = shapes_of(cfg)
    rows: list[list[Wanted]] = []
    covered: set[str] = set()
    for rule in family.table:
        if rule.paths[0] not in shapes:
            continue
        covered |= set(rule.paths)
        layered = "{i}" in rule.name
        parts = [shapes[path][1:] if layered else shapes[path] for path in rule.paths]
        shape = (*parts[0][:-1], sum(part[-1] for part in parts))
        shape = shape[::-1] if rule.transpose else shape
        layers = range(cfg.n_layers) if layered else (None,)
        rows.append([Wanted(rule.name.replace("{i}", str(i)), rule, i, shape) for i in layers])
    if missing := sorted(shapes.keys() - covered):
        raise InputError(f"a {family.model_type} model has no place for the weight {missing[0]}.")
    return rows


def place(
    cfg: ModelConfig,
    family: Family,
    source: Source,
    *,
    dtype: DTypeLike | None = None,
    sharding: Sharding | None = None,
) -> model.Params:
    """The parameters of a model from a family's tensors.

    Args:
        cfg: the model's shape.
        family: whose names the tensors have, with or without its prefix.
        source: where they are.
        dtype: of the parameters; by default float32, whatever the file has.
        sharding: path of a weight -> where to put it; None is the default device.

    Returns:
        The tree that `jaxlm.init` makes.

    Raises:
        InputError: a tensor is missing, of another shape, unknown to the family, or holds NaN or infinite numbers; or
            a separate head does not equal the embedding that the configuration ties it to. Names file and tensor.
    """
    kind = parameter_type(dtype)
    rows = wanted(cfg, family)
    names = _match(cfg, family, rows, source)
    sizes = shapes_of(cfg)
    params: model.Params = {}
    for row in rows:
        paths = row[0].rule.paths
        leaves = [_aligned(sizes[path], kind) for path in paths]
        for item in row:
            value = _read(source, names[item.name])
            places = [leaf if item.layer is None else leaf[item.layer] for leaf in leaves]
            _scatter(value.T if item.rule.transpose else value, places)
            narrower = kind != value.dtype and kind.itemsize <= value.dtype.itemsize
            if narrower and not all(map(finite, places)):
                name = names[item.name]
                raise InputError(f"{source.where(name)}: tensor {name} has numbers beyond {kind}; load it as float32.")
        del value, places
        for path in paths:
            _put(params, path, leaves.pop(0), sharding)
    return params


def parameter_type(dtype: DTypeLike | None) -> np.dtype:
    """The type that parameters are asked to have; float32 when empty.

    Raises:
        InputError: it is none of float32, bfloat16 and float16.
    """
    try:
        kind = np.dtype(np.float32 if dtype is None else dtype)
    except TypeError:
        kind = np.dtype(object)
    if kind not in _DTYPES:
        raise InputError(f"dtype: parameters are {', '.join(map(str, _DTYPES))}, found {dtype!r}.")
    return kind


def _found(family: Family, name: str, shapes: Mapping[str, Shape]) -> str | None:
    """The name under which a tensor is there, with or without the prefix."""
    return next((n for n in (name, name.removeprefix(family.prefix)) if n in shapes), None)


def _match(cfg: ModelConfig, family: Family, rows: list[list[Wanted]], source: Source) -> dict[str, str]:
    """For each tensor that is wanted the name under which it is there; refuses what is missing, odd or left over."""
    names: dict[str, str] = {}
    missing: list[str] = []
    for item in (item for row in rows for item in row):
        name = _found(family, item.name, source.shapes)
        if name is None:
            missing.append(item.name)
            continue
        names[item.name] = name
        if source.shapes[name] != item.shape:
            raise InputError(
                f"{source.where(name)}: tensor {name} has shape {list(source.shapes[name])}, but the configuration "
                f"asks for {list(item.shape)}; take the config.json that belongs to the weights."
            )
    if missing:
        raise InputError(f"{source.where(missing[0])}: tensor {missing[0]} is missing{_more(missing)}.")
    taken = set(names.values())
    extra = [name for name in source.shapes if name not in taken and not name.endswith(family.ignored)]
    if cfg.tie_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        _require_tied(family, names, source)
    if extra:
        raise InputError(
            f"{source.where(extra[0])}: tensor {extra[0]} has no place in a {family.model_type} model of this "
            f"configuration{_more(extra)}; take the config.json that belongs to the weights."
        )
    return names


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _require_tied(family: Family, names: dict[str, str], source: Source) -> None:
    embedding = next(rule.name for rule in family.table if rule.paths == ("embed/tokens",))
    head, tokens = _read(source, "lm_head.weight"), _read(source, names[embedding])
    if not np.array_equal(head, tokens):
        raise InputError(
            f"{source.where('lm_head.weight')}: tensor lm_head.weight differs from {names[embedding]}, to which "
            "config.json ties it; set tie_word_embeddings to false there."
        )


def _read(source: Source, name: str) -> np.ndarray:
    value = source.read(name)
    if value.dtype not in (*_DTYPES, np.float64):
        raise InputError(
            f"{source.where(name)}: tensor {name} holds {value.dtype}; quantized weights are not supported, so take "
            "the model in bfloat16 or float32."
        )
    if not finite(value):
        raise InputError(f"{source.where(name)}: tensor {name} holds NaN or infinite numbers; get a sound copy.")
    return value


def finite(value: np.ndarray) -> bool:
    """Whether no number is NaN or infinite."""
    # A sum is not finite when one of its terms is not; unlike isfinite(value).all() it makes no second array.
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(value.sum(dtype=np.float64)))


def _scatter(value: np.ndarray, places: list[np.ndarray]) -> None:
    """Writes `value` into `places`, which lie side by side along its last axis."""
    start = 0
    with np.errstate(over="ignore"):  # found by the check that follows
        for place in places:
            place[...] = value[..., start : start + place.shape[-1]]
            start += place.shape[-1]


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _put(params: model.Params, path: str, leaf: np.ndarray, sharding: Sharding | None) -> None:
    *parents, last = path.split("/")
    node = params
    for parent in parents:
        node = node.setdefault(parent, {})
    target = sharding(path) if sharding else None
    if target is None or target.is_fully_addressable:
        node[last] = jax.device_put(leaf, target)
    else:  # each process fills the shards of its own devices
        node[last] = jax.make_array_from_callback(leaf.shape, target, lambda index: leaf[index])


def tensors(
    cfg: ModelConfig, family: Family, params: model.Params
) -> tuple[list[tuple[str, np.dtype, Shape]], Iterator[np.ndarray]]:
    """The tensors of a model in a family's format, the reverse of `place`.

    Args:
        cfg: the model's shape.
        family: one that expresses it.
        params: from `init` or `place`, not prepared for decoding.

    Returns:
        Name, type and shape of each tensor, the widest types first; and the tensors, made one at a time.

    Raises:
        InputError: `params` is not of that shape, or holds NaN or infinite numbers; names the weight.
    """
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    _require_shapes(cfg, leaves)
    items = [item for row in wanted(cfg, family) for item in row]
    types = {item.rule: np.result_type(*(leaves[path].dtype for path in item.rule.paths)) for item in items}
    items.sort(key=lambda item: -types[item.rule].itemsize)

    def values() -> Iterator[np.ndarray]:
        for item in items:
            parts = [np.asarray(leaves[path]) for path in item.rule.paths]
            parts = parts if item.layer is None else [part[item.layer] for part in parts]
            if not all(map(finite, parts)):
                raise InputError(f"params: {item.rule.paths[0]} holds NaN or infinite numbers, so nothing was saved.")
            value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
            yield value.T if item.rule.transpose else value

    return [(item.name, types[item.rule], item.shape) for item in items], values()


def _require_shapes(cfg: ModelConfig, leaves: Mapping[str, Any]) -> None:
    sizes = shapes_of(cfg)
    for path in {**sizes, **leaves}:
        found = list(leaves[path].shape) if path in leaves else "nothing"
        asked = list(sizes[path]) if path in sizes else "no such weight"
        if found != asked:
            raise InputError(
                f"params: {path}: found {found}, but the configuration has {asked}; give the configuration and the "
                "parameters of one model, as they were before sample.prepare."
            )
