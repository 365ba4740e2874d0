"""Drives prefill and decode for one group of requests, and slides windows that have reached the context's end.

A sliding row sees a window of its last tokens, at positions from 0. When a window would come to hold more than
C = max_seq_len tokens, it is cut to its last C // 2, which are prefilled anew: one prefill in about C / 2 tokens.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model import Cache, Params
from jaxlm.model.cache import map_rows
from jaxlm.sample import answers
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.decode import Requests, State


def start(
    cfg: ModelConfig,
    params: Params,
    group: list[asking.Entry],
    *,
    slots: int,
    key: jax.Array,
    stop_ids: tuple[int, ...],
    n_vocab: int,
    n_top: int = 0,
) -> tuple[Requests, State]:
    """A group's arrays, and its state before the first new token.

    Args:
        cfg: the model.
        params: from `prepare`.
        group: one of `requests.groups`.
        slots: B.
        key: the call's.
        stop_ids: ids that end an answer.
        n_vocab: ids from here on are never produced.
        n_top: most likely tokens to be noted of each new one.
    """
    width, room = asking.width(cfg, group[0]), asking.bucket(max(r.max_new for r in group))
    capacity = cfg.max_seq_len if group[0].slides else asking.capacity(cfg, width, room)
    asked = asking.pack(group, slots, width, key, stop_ids, n_vocab)
    return asked, decoding.prefill(cfg, params, asked.prompt, capacity=capacity, n_new=room, n_top=n_top)


def advance(cfg: ModelConfig, params: Params, asked: Requests, state: State, steps: int, *, slides: bool) -> State:
    """Up to `steps` more tokens for every running row. Uses up `state`.

    Args:
        cfg: the model.
        params: from `prepare`.
        asked: the group's requests.
        state: where they stand.
        steps: at least 1.
        slides: the group's rows may exceed the context; what is decoded without a look in between is then shorter.
    """
    if not slides:
        return decoding.decode(cfg, params, asked, state, steps)
    while steps > 0:
        state = slide(cfg, params, asked, state)
        running, held = np.asarray(state.finished) == decoding.RUNNING, np.asarray(state.cache.length)
        if not running.any():
            break
        now = min(steps, int(cfg.max_seq_len - held[running].max()))
        state = decoding.decode(cfg, params, asked, state, now)
        steps -= now
    return state


def finish(
    cfg: ModelConfig,
    params: Params,
    asked: Requests,
    state: State,
    *,
    slides: bool,
    stops: tuple[str, ...],
    tokenizer: Decodes | None,
) -> State:
    """Decodes to the end; with stop strings a few tokens at a time, to end rows whose text holds one. Uses up `state`.

    What such a row holds beyond its stop string is cut when the answer is read.
    """
    room = state.tokens.shape[1]
    if tokenizer is None or not stops:
        return advance(cfg, params, asked, state, room, slides=slides)
    for _ in range(0, room, answers.STRIDE):
        state = advance(cfg, params, asked, state, answers.STRIDE, slides=slides)
        state = answers.end_at_stops(state, [stops] * state.last.shape[0], tokenizer)
        if not (np.asarray(state.finished) == decoding.RUNNING).any():
            break
    return state


def slide(cfg: ModelConfig, params: Params, asked: Requests, state: State) -> State:
    """Cuts running windows that are full to their last C // 2 tokens, which are prefilled anew. Uses up `state`.

    Looks at the device, so it is not for `jit`.
    """
    full = (np.asarray(state.finished) == decoding.RUNNING) & (np.asarray(state.cache.length) >= cfg.max_seq_len)
    if not full.any():
        return state
    window = _window(asked, state, full, asking.kept(cfg))
    fresh = decoding.prefill(cfg, params, window, capacity=cfg.max_seq_len, n_new=1).cache
    return _with_rows(state, fresh, full)


@partial(jax.jit, static_argnames="size")
def _window(asked: Requests, state: State, full: jax.Array, size: int) -> jax.Array:
    """The last `size` tokens of the rows that are full, int32[B, size]; -1 in others."""
    ids = decoding.history(asked, state)
    end = (asked.prompt >= 0).sum(-1) + state.n_new
    last = jnp.take_along_axis(ids, jnp.maximum(end[:, None] - size + jnp.arange(size), 0), axis=1)
    return jnp.where(full[:, None], last, -1)


@partial(jax.jit, donate_argnames="state")
def _with_rows(state: State, fresh: Cache, full: jax.Array) -> State:
    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(full.reshape((-1,) + (1,) * (old.ndim - 1)), new, old) if old.size else old

    return state._replace(cache=map_rows(pick, fresh, state.cache))
