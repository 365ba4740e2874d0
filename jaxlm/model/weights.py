"""The weight table: what is known of each weight beside its shape, keyed by path.

A weight's shape, initializer and logical axes stand with its layer in `blocks.py`; everything else about it stands
here, once. A test fails when a model has a weight that is missing here. The weights' names in published files are
in `jaxlm.interop.families`, by architecture.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxlm.errors import InputError

Path = tuple[str, ...]


class Weight(NamedTuple):
    """One row of the table.

    Attributes:
        decay: whether weight decay applies (matrices yes; embeddings, norms, biases and tables no).
        matrix: the axes (inputs, outputs) of the matrix that Muon orthogonalises, after the layer axis; None: Adam.
        meaning: what the weight does, in a few words.
    """

    decay: bool
    matrix: tuple[int, int] | None
    meaning: str


_MATRIX = (1, 2)  # axis 0 is the layer

TABLE: dict[str, Weight] = {
    "bigram/table": Weight(False, None, "logits of the next token, one row per token"),
    "embed/tokens": Weight(False, None, "a vector for each token"),
    "embed/positions": Weight(False, None, "a vector for each position"),
    "embed/mix": Weight(False, None, "gains of the embeddings of the tokens before, per distance"),
    "blocks/norm1/scale": Weight(False, None, "gain before (or after) attention"),
    "blocks/norm1/bias": Weight(False, None, "shift before (or after) attention"),
    "blocks/attn/q/kernel": Weight(True, _MATRIX, "what each position looks for"),
    "blocks/attn/q/bias": Weight(False, None, "shift of the queries"),
    "blocks/attn/k/kernel": Weight(True, _MATRIX, "what each position can be found by"),
    "blocks/attn/k/bias": Weight(False, None, "shift of the keys"),
    "blocks/attn/v/kernel": Weight(True, _MATRIX, "what each position hands over when found"),
    "blocks/attn/v/bias": Weight(False, None, "shift of the values"),
    "blocks/attn/q_norm/scale": Weight(False, None, "gain of the query norm, per head dimension"),
    "blocks/attn/k_norm/scale": Weight(False, None, "gain of the key norm, per head dimension"),
    "blocks/attn/o/kernel": Weight(True, _MATRIX, "mixes the heads back into the residual stream"),
    "blocks/attn/o/bias": Weight(False, None, "shift of the attention output"),
    "blocks/norm2/scale": Weight(False, None, "gain before (or after) the MLP"),
    "blocks/norm2/bias": Weight(False, None, "shift before (or after) the MLP"),
    "blocks/mlp/up/kernel": Weight(True, _MATRIX, "features that the MLP tests for"),
    "blocks/mlp/up/bias": Weight(False, None, "thresholds of those features"),
    "blocks/mlp/gate/kernel": Weight(True, _MATRIX, "gates of those features (SwiGLU)"),
    "blocks/mlp/gate/bias": Weight(False, None, "thresholds of the gates"),
    "blocks/mlp/down/kernel": Weight(True, _MATRIX, "what each feature writes to the residual stream"),
    "blocks/mlp/down/bias": Weight(False, None, "shift of the MLP output"),
    "final_norm/scale": Weight(False, None, "gain before the head"),
    "final_norm/bias": Weight(False, None, "shift before the head"),
    "head/kernel": Weight(False, None, "a vector for each next token"),
    "head/bias": Weight(False, None, "shift of each token's logit"),
}


def path_of(key_path: Any) -> str:
    """A jax key path as `a/b/c`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def weight(path: str) -> Weight:
    """The table's row for a path such as `blocks/attn/q/kernel`.

    Raises:
        InputError: the table has no such weight.
    """
    if path not in TABLE:
        raise InputError(f"params: {path}: no such weight; give the parameters as they were before sample.prepare.")
    return TABLE[path]


def decay_mask(params: Any) -> Any:
    """True for the weights that weight decay applies to; the same tree as `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: weight(path_of(path)).decay, params)


def count(params: Any) -> int:
    """How many numbers the parameters hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
