"""Guesses for speculative decoding: from what the history repeats, or from a smaller model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.model import Cache, Params, forward, unembed
from jaxlm.sample import decode as decoding
from jaxlm.sample.decode import Requests, State
from jaxlm.sample.filters import filter_logits
from jaxlm.sample.sampler import draw_kept

DRAFT, ACCEPT, REST = 1, 2, 3  # the three draws of one position, where a model guesses


def look_up(history: jax.Array, length: jax.Array, n: int, max_ngram: int) -> jax.Array:
    """What followed the last occurrence of the longest run of latest tokens: int32[B, n], -1 where there is none.

    Args:
        history: int32[B, S], tokens so far.
        length: int32[B], how many.
        n: tokens wanted; where the history ends before, it is taken to repeat.
        max_ngram: longest run to look for.
    """
    places, rows = jnp.arange(history.shape[1])[None, :], jnp.arange(history.shape[0])[:, None]
    end = length[:, None] - 1
    matches = jnp.broadcast_to(places < end, history.shape)
    run = jnp.zeros_like(history)  # how many of the latest tokens end at each place
    for back in range(max_ngram):
        earlier = jnp.pad(history, ((0, 0), (back, 0)), constant_values=-2)[:, : history.shape[1]]
        latest = jnp.where(end >= back, history[rows, jnp.maximum(end - back, 0)], -3)
        matches = matches & (earlier == latest)
        run = run + matches
    place = jnp.argmax(run * history.shape[1] + places * (run > 0), axis=-1)[:, None]
    ids = history[rows, place + 1 + jnp.arange(n)[None, :] % jnp.maximum(end - place, 1)]
    return jnp.where(run.max(-1, keepdims=True) > 0, ids, -1)


def from_model(
    cfg: ModelConfig, params: Params, requests: Requests, state: State, cache: Cache, n: int
) -> tuple[jax.Array, jax.Array, Cache]:
    """n guesses of the draft model: int32[B, n], their distributions float32[B, n, V], and its cache with them."""
    room = state.tokens.shape[1]
    rows = jnp.arange(state.last.shape[0])

    def one(carry: tuple[Cache, State, jax.Array], i: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        cache, ahead, good = carry
        hidden, grown = forward(cfg, params, ahead.last[:, None], cache=cache)
        assert grown is not None
        logits = decoding.adjust(unembed(cfg, params, hidden[:, 0]), requests, ahead)
        kept = filter_logits(logits, **decoding.filters_of(requests))
        token = draw_kept(keys_at(requests.key, state.cache.length + 1 + i, DRAFT), kept)
        good = good & (token >= 0)
        ahead = ahead._replace(
            last=jnp.where(good, token, 0),
            tokens=ahead.tokens.at[rows, jnp.minimum(ahead.n_new, room)].set(token, mode="drop"),
            n_new=ahead.n_new + 1,
        )
        return (grown, ahead, good), (jnp.where(good, token, -1), jax.nn.softmax(kept, axis=-1))

    start = (cache, state, jnp.ones(rows.shape, bool))
    (cache, ahead, _), (guesses, q) = lax.scan(one, start, jnp.arange(n))
    # The last guess too is fed, for the case that it is accepted: the next round goes on behind it.
    _, cache_with_all = forward(cfg, params, ahead.last[:, None], cache=cache)
    assert cache_with_all is not None
    return guesses.T, q.swapaxes(0, 1), cache_with_all


def keys_at(key: jax.Array, position: jax.Array, purpose: int) -> jax.Array:
    """Typed keys of one draw, for rows of keys [B], at positions int32[B] or [B, n]."""

    def one(key: jax.Array, at: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, at), purpose)

    return jax.vmap(one if position.ndim == 1 else jax.vmap(one, in_axes=(None, 0)))(key, position)
