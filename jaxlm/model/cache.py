"""The key/value cache of incremental decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError


class Cache(NamedTuple):
    """Keys and values seen so far. Rows are right-padded: places at or after `length` hold no information.

    Attributes:
        k: [L, B, S, K, h], or a tuple of L arrays [B * K, S, h], as attention reads them (see `init_cache`).
        v: like `k`.
        length: int32[B], tokens held by each row. After a prefill of right-padded prompts, replace it by the
            prompts' true lengths: the padding's keys are then masked and later overwritten.
        tokens: int32[B, S], the ids themselves, for models with `embed_mix`; None for others.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    length: jax.Array
    tokens: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """S."""
        return self.k[0].shape[1] if isinstance(self.k, tuple) else self.k.shape[2]


def init_cache(
    cfg: ModelConfig, batch: int, length: int, dtype: jnp.dtype | str | None = None, *, stacked: bool = True
) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens.

    Args:
        cfg: the model.
        batch: B.
        length: S; with learned positions at most cfg.max_seq_len, since no token can stand beyond them.
        dtype: of keys and values; the compute type when empty.
        stacked: False keeps one array a layer, which decoding updates in place without touching the others, and
            heads before places, so that no step has to turn a layer's whole cache round (5.9 times a layer's time
            at B=8, S=80, D=576 on two cores). Rows and heads are one axis, since XLA's CPU backend copies an array
            that is written in one shape and multiplied in another (a fifth of a step at B=1, S=1040).

    Raises:
        InputError: more places than learned positions.
    """
    if cfg.position == "learned" and cfg.kind == "transformer" and length > cfg.max_seq_len:
        raise InputError(
            f"length: a cache of {length} places is longer than the {cfg.max_seq_len} positions that this model has "
            "learned; ask for fewer."
        )
    layers, shape = cfg.n_layers, (batch, length, cfg.kv_heads, cfg.d_head)
    dtype = jnp.dtype(dtype or cfg.compute_dtype)
    lengths = jnp.zeros(batch, jnp.int32)
    tokens = jnp.zeros((batch, length), jnp.int32) if cfg.embed_mix and cfg.kind == "transformer" else None
    if cfg.kind == "bigram":  # no layers, no memory: the length still counts positions
        return Cache(jnp.zeros((0, *shape), dtype), jnp.zeros((0, *shape), dtype), lengths)
    if stacked:
        return Cache(jnp.zeros((layers, *shape), dtype), jnp.zeros((layers, *shape), dtype), lengths, tokens)
    flat = (batch * cfg.kv_heads, length, cfg.d_head)
    k, v = (tuple(jnp.zeros(flat, dtype) for _ in range(layers)) for _ in range(2))
    return Cache(k, v, lengths, tokens)


def write(cache: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
    """Puts new [B, K, T, h] into cache [B * K, S, h] at each row's own `length` int32[B].

    Writes past S are dropped, never wrapped or clamped onto earlier places.
    """
    new = new.astype(cache.dtype)
    batch, kv, t, h = new.shape
    if t == 1:
        return cache.at[jnp.arange(batch * kv), jnp.repeat(length, kv)].set(new.reshape(-1, h), mode="drop")
    columns = length[:, None] + jnp.arange(t)[None, :]  # all heads of a place at once: there are many places
    rows = cache.reshape(batch, kv, -1, h).at[jnp.arange(batch)[:, None], :, columns]
    return rows.set(new.swapaxes(1, 2), mode="drop").reshape(cache.shape)


def map_rows(f: Callable[..., jax.Array], *caches: Cache) -> Cache:
    """`f` over the arrays of caches with a layer's each apart, rows as their first axis: [B, K, S, h] a layer.

    What `f` gives has rows first too, as many as it likes, the same in each array.
    """

    def by_row(cache: Cache) -> Cache:
        rows = cache.length.shape[0]
        return _over_layers(lambda layer: layer.reshape(rows, -1, *layer.shape[1:]), cache)

    return _over_layers(lambda layer: layer.reshape(-1, *layer.shape[2:]), jax.tree.map(f, *map(by_row, caches)))


def _over_layers(f: Callable[[jax.Array], jax.Array], cache: Cache) -> Cache:
    """A bigram has no layers, and one empty array in their place."""
    if not isinstance(cache.k, tuple) or not isinstance(cache.v, tuple):
        return cache
    return cache._replace(k=tuple(map(f, cache.k)), v=tuple(map(f, cache.v)))


def write_tokens(history: jax.Array, new: jax.Array, length: jax.Array) -> jax.Array:
    """Puts ids int32[B, T] into history int32[B, S] at each row's own `length` int32[B]; past S they are dropped."""
    rows = jnp.arange(history.shape[0])[:, None]
    return history.at[rows, length[:, None] + jnp.arange(new.shape[1])[None, :]].set(new, mode="drop")
