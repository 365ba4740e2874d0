"""Changes to logits before any filter: penalties, bias, bans, n-grams and least lengths, each a small pure function.

Token lists are fixed-width arrays [..., N], padded with any id outside the vocabulary (-1 by convention), so that no
list's length causes a recompile. Nothing is ever as wide as the vocabulary but the logits.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike


def repetition(logits: jax.Array, history: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Divides positive logits of tokens in `history` by `penalty`, and multiplies negative ones by it.

    Args:
        logits: float32[..., V].
        history: int32[..., N], prompt and answer; repeated tokens count once.
        penalty: scalar or [...], above 0; 1 changes nothing.

    Source: Keskar et al., CTRL (arXiv 1909.05858), section 4.1, in the form for logits of either sign that
    transformers uses.
    """
    rows, ids, values = _gather(logits, history)
    wide = _spread(penalty, logits)[:, None]
    # The divisor varies along the row: a division by a broadcast would be a product with the reciprocal at some shapes.
    positive = values / jnp.where(values > 0, wide, 1.0)
    return _put(logits, rows, ids, jnp.where(values > 0, positive, values * wide))


def presence(logits: jax.Array, history: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Subtracts `penalty` from the logits of tokens in `history` (int32[..., N], the answer so far), once each."""
    rows, ids, values = _gather(logits, history)
    return _put(logits, rows, ids, values - _spread(penalty, logits)[:, None])


def frequency(logits: jax.Array, history: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Subtracts `penalty` from a token's logit for each time that it is in `history` (int32[..., N])."""
    return bias(logits, history, -jnp.broadcast_to(jnp.asarray(penalty, jnp.float32), logits.shape[:-1])[..., None])


def bias(logits: jax.Array, ids: jax.Array, values: ArrayLike) -> jax.Array:
    """Adds `values` to the logits of `ids` (both [..., N]); -inf bans them."""
    shape = jnp.shape(ids)
    x, ids = _rows(logits), _rows(_outside(ids, logits.shape[-1]))
    amounts = _rows(jnp.broadcast_to(jnp.asarray(values, jnp.float32), shape))
    return x.at[jnp.arange(x.shape[0])[:, None], ids].add(amounts, mode="drop").reshape(logits.shape)


def ban(logits: jax.Array, ids: jax.Array, active: ArrayLike = True) -> jax.Array:
    """Sets the logits of `ids` (int32[..., N]) to -inf in the rows where `active` (bool, scalar or [...])."""
    wanted = _spread(active, logits, bool)[:, None]
    ids = jnp.where(wanted, _rows(_outside(ids, logits.shape[-1])), logits.shape[-1])
    x = _rows(logits)
    return x.at[jnp.arange(x.shape[0])[:, None], ids].set(-jnp.inf, mode="drop").reshape(logits.shape)


def min_new_tokens(logits: jax.Array, stop_ids: jax.Array, n_new: ArrayLike, least: ArrayLike) -> jax.Array:
    """Bans `stop_ids` (int32[..., N]) in rows that have fewer new tokens, `n_new`, than `least`: scalars or [...]."""
    return ban(logits, stop_ids, jnp.asarray(n_new) < jnp.asarray(least))


def no_repeat_ngram(logits: jax.Array, history: jax.Array, n: ArrayLike) -> jax.Array:
    """Bans every token that would complete an n-gram which is in `history` already.

    A row whose every token is banned has no distribution left.

    Args:
        logits: float32[..., V].
        history: int32[..., T], prompt and answer without a gap; -1 after the end.
        n: scalar or [...]; 1 bans every token of the history, 0 nothing.

    Source: Paulus et al. (arXiv 1705.04304), section 2.5, for n = 3; transformers has the same rule.
    """
    width = history.shape[-1]
    if not width:
        return logits
    ids, size, place = _rows(history), _spread(n, logits, jnp.int32)[:, None], jnp.arange(width)
    length = (ids >= 0).sum(-1, keepdims=True)

    def back(j: jax.Array, follows: jax.Array) -> jax.Array:
        """Narrows the places down to those with the same token j places before them as the token to come has."""
        before = jnp.where(place >= j, jnp.take(ids, jnp.maximum(place - j, 0), axis=1), -2)
        last = jnp.where(length >= j, jnp.take_along_axis(ids, jnp.maximum(length - j, 0), axis=1), -3)
        return follows & ((j >= size) | (before == last))

    # Data bounds the loop, so n compiles nothing; no place has more than T - 1 tokens before it.
    follows = lax.fori_loop(1, jnp.minimum(size.max(initial=0), width + 1), back, (size > 0) & (place < length))
    return ban(logits, jnp.where(follows, ids, -1).reshape(history.shape))


def _rows(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return jnp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _outside(ids: jax.Array, vocab: int) -> jax.Array:
    return jnp.where(ids < 0, vocab, ids)  # negative indices would count from the end


def _spread(option: ArrayLike, logits: jax.Array, dtype: type = jnp.float32) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(option, dtype), logits.shape[:-1]).reshape(-1)


def _gather(logits: jax.Array, history: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, ids = _rows(logits), _rows(_outside(history, logits.shape[-1]))
    rows = jnp.arange(x.shape[0])[:, None]
    return rows, ids, x.at[rows, ids].get(mode="fill", fill_value=0.0)


def _put(logits: jax.Array, rows: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    return _rows(logits).at[rows, ids].set(values, mode="drop").reshape(logits.shape)
