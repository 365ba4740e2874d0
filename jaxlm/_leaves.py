"""Pytrees as named leaves: what is stored, and how a stored tree is compared with the one that is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm._digests import Leaf
from jaxlm.errors import InputError

_Path = tuple[str, ...]


def _named(tree: Any) -> dict[_Path, Any]:
    """Leaves by the names on the way to them; a tree that is a single leaf has it under "value"."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path) or ("value",): x for path, x in flat}


def to_arrays(item: str, tree: Any) -> dict[_Path, jax.Array | np.ndarray]:
    """The leaves of `tree` as arrays, by the names on the way to them. Nothing is copied: Orbax does it in its save.

    Raises:
      InputError: a leaf is not an array or number, or is one that would not come back with the same bits and dtype.
    """
    named = _named(tree)
    written = {".".join(path) for path in named}
    if len(written) < len(jax.tree.leaves(tree)):
        raise InputError(f"two leaves of {item!r} have the same path; rename the keys that contain a dot")
    return {path: _to_array("/".join((item, *path)), leaf) for path, leaf in named.items()}


def _to_array(path: str, leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise InputError(f"{path} is a typed random key, which has no stored form; save jax.random.key_data of it")
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        return np.asarray(leaf, jax.dtypes.result_type(leaf))
    if not isinstance(leaf, np.ndarray | np.generic):
        raise InputError(f"{path} is a {type(leaf).__name__}; only arrays and numbers can be saved")
    if (kept := jax.dtypes.canonicalize_dtype(leaf.dtype)) != leaf.dtype:
        raise InputError(f"{path} is {leaf.dtype}, which jax would read back as {kept}; cast it first or enable x64")
    return np.asarray(leaf)


def describe(named: dict[_Path, Any]) -> list[Leaf]:
    """Path, global shape and dtype of each leaf."""
    return [Leaf("/".join(path), tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for path, leaf in named.items()]


def nest(named: dict[_Path, Any]) -> dict[str, Any]:
    """Dicts all the way: the form in which leaves are stored, whatever containers held them.

    Arrays with no element are left out: Orbax refuses them, and the manifest says all there is to know.
    """
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        if math.prod(leaf.shape) == 0:
            continue
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def targets(tree: Any) -> dict[_Path, jax.ShapeDtypeStruct]:
    """What to read for each leaf: shape, dtype, and the leaf's own sharding or else the default device."""
    here = jnp.zeros(()).sharding
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)
        for path, leaf in _named(tree).items()
    }


def rebuild(tree: Any, nested: Any) -> Any:
    """The leaves of `nested` (see `nest`) in the containers of `tree`."""
    leaves = []
    for path, target in targets(tree).items():
        if math.prod(target.shape) == 0:
            leaves.append(jnp.zeros(target.shape, target.dtype, device=target.sharding))
        else:
            leaves.append(reduce(getitem, path, nested))
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def require_same(item: str, found: Sequence[Leaf], expected: Sequence[Leaf], source: str) -> None:
    """Raises InputError naming the first leaf that is missing, unexpected, or of another shape or dtype."""
    saved, wanted = {leaf.path: leaf for leaf in found}, {leaf.path: leaf for leaf in expected}
    differing = [path for path in {**wanted, **saved} if saved.get(path) != wanted.get(path)]
    if not differing:
        return
    path = differing[0]
    here, there = (f"{tree[path]}" if path in tree else "no such leaf" for tree in (wanted, saved))
    more = f" (and {len(differing) - 1} more leaves differ)" if len(differing) > 1 else ""
    raise InputError(
        f"{item}/{path} is {there} in {source}, but {here} is expected{more}; "
        "use the configuration that the checkpoint was saved with, or another directory"
    )
