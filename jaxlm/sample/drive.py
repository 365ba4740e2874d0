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
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.decode import Requests, State


def start(
    cfg: ModelConfig,
    params: Params,
    group: list[asking.Request],
    *,
    slots: int,
    key: jax.Array,
    stop_ids: tuple[int, ...],
    n_vocab: int,
    n_top: int = 0,
) -> tuple[Requests, State]:
    """A group's arrays, and its state before the first new token. The group is one of `requests.groups`."""
    width, room = asking.width(cfg, group[0]), asking.bucket(max(r.max_new for r in group))
    capacity = cfg.max_seq_len if group[0].slides else width + room
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
        running, held = np.asarray(state.finished) == decoding.RUNNING, np.asarray(state.cache.length)
        if not running.any():
            break
        full = running & (held >= cfg.max_seq_len)
        if full.any():
            window = _window(asked, state, full, asking.kept(cfg))
            fresh = decoding.prefill(cfg, params, window, capacity=cfg.max_seq_len, n_new=1).cache
            state = _with_rows(state, fresh, full)
            held = np.where(full, asking.kept(cfg) - 1, held)
        now = min(steps, int(cfg.max_seq_len - held[running].max()))
        state = decoding.decode(cfg, params, asked, state, now)
        steps -= now
    return state


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

    return state._replace(cache=jax.tree.map(pick, fresh, state.cache))
