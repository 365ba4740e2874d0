"""Continuous batching: a fixed number of slots that requests enter and leave while the others go on.

    state = init(cfg, params, slots=8, capacity=1024, n_new=256)
    state = insert(cfg, params, state, slot, Request(prompt, 100), index=0)     # others keep their places
    state = step(cfg, params, state, 16)                                        # up to 16 tokens, or until one ends
    seen = peek(state, slot)                                                    # of an answer that may still grow
    answer = harvest(state, slot)
    state = free(state, slot)

`EngineState` is a pytree; these functions return a new one and use up the buffers of the old one. `jaxlm.sample.serve`
is the loop around them.

A prompt is prefilled alone, at its own power-of-two width, and its row is then copied into the slot. So with one number
of slots, one capacity and one n_new, a request gets the same bits in any slot, with any neighbours, in any order of
arrival. They are those of `generate` but for the rounding of its other shapes: it prefills `slots` rows together and
has a cache of another length.

Where requests may exceed the model's context (`overflow="slide"`, in slots of that capacity), call `slide` before
`step`: windows that are full are cut as in `jaxlm.sample.drive`. A slot with a full window does not step.

Compilations: `step` once, `insert` once for each power of two of prompt length; both again when a request has more stop
ids or biased and banned ids than any before, by powers of two from 16; `slide` one prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Cache, Params
from jaxlm.model.cache import map_rows
from jaxlm.sample import answers, arguments, drive
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.answers import Generation
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Overflow, Request


class EngineState(NamedTuple):
    """All slots.

    Attributes:
        requests: what the rows were asked for, one row a slot.
        rows: where they stand; a slot without a request has finished.
        used: bool[B], the slot holds a request, running or not yet freed.
        key: typed key [], which the draws of requests without a seed follow from.
        idle: `requests` of one row, which free slots hold: options that cost nothing.
    """

    requests: decoding.Requests
    rows: decoding.State
    used: jax.Array
    key: jax.Array
    idle: decoding.Requests

    @property
    def slots(self) -> int:
        """B."""
        return self.used.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a row holds, prompt and answer."""
        return self.requests.prompt.shape[1]

    @property
    def n_new(self) -> int:
        """Tokens that an answer may have."""
        return self.rows.tokens.shape[1]

    @property
    def n_top(self) -> int:
        """Most likely tokens that are noted of each new one."""
        return self.rows.top_tokens.shape[-1]


def init(
    cfg: ModelConfig,
    params: Params,
    *,
    slots: int,
    capacity: int,
    n_new: int,
    key: jax.Array | int | None = None,
    n_vocab: int | None = None,
    n_top: int = 0,
) -> EngineState:
    """An engine without requests.

    Args:
        cfg: the model.
        params: from `prepare`.
        slots: B, requests that decode together.
        capacity: tokens that a slot holds, prompt and answer; at most cfg.max_seq_len.
        n_new: tokens that an answer may have.
        key: as in `generate`; request `index` draws with fold_in(key, index), or from its own seed.
        n_vocab: ids from here on are padding of the vocabulary, never produced.
        n_top: most likely tokens to be noted of each new one.

    Raises:
        InputError: a size below 1, or a capacity beyond the model's context.
    """
    arguments.check_cfg(cfg)
    for name, size in (("slots", slots), ("capacity", capacity), ("n_new", n_new)):
        arguments.check_count(name, size)
    arguments.check_count("n_top", n_top, 0, cfg.vocab_size)
    if capacity > cfg.max_seq_len and cfg.kind != "bigram":
        raise InputError(f"capacity: must be at most the model's context of {cfg.max_seq_len}, found {capacity}.")
    nobody = asking.Entry(0, [0], Sampling(temperature=0), 1)
    key = arguments.check_key(key)
    idle = asking.pack([nobody], 1, capacity, key, (), n_vocab or cfg.vocab_size)
    return _empty(cfg, idle, key, slots=slots, capacity=capacity, n_new=n_new, n_top=n_top)


@partial(jax.jit, static_argnames=("slots", "capacity", "n_new", "n_top"))
def _empty(
    cfg: ModelConfig, idle: decoding.Requests, key: jax.Array, *, slots: int, capacity: int, n_new: int, n_top: int
) -> EngineState:
    return EngineState(
        requests=jax.tree.map(lambda leaf: jnp.repeat(leaf, slots, axis=0) if leaf.ndim else jnp.copy(leaf), idle),
        rows=decoding.blank(cfg, slots, capacity=capacity, n_new=n_new, n_top=n_top),
        used=jnp.zeros(slots, bool),
        key=jnp.copy(key),  # buffers of its own, for the state will be used up
        idle=jax.tree.map(jnp.copy, idle),
    )


def insert(
    cfg: ModelConfig,
    params: Params,
    state: EngineState,
    slot: int,
    request: Request,
    *,
    index: int,
    sample: int = 0,
    overflow: Overflow = "refuse",
) -> EngineState:
    """Prefills a request and puts it into a free slot. Uses up `state`.

    Args:
        cfg: the model.
        params: from `prepare`.
        state: the engine.
        slot: 0 .. B-1.
        request: what to continue, and how. Its `stop` strings are for `serve`.
        index: the request's number, which its draws depend on as in `generate`: each request one of its own.
        sample: number among the answers to the request, which its draws depend on as well.
        overflow: as in `generate`; `slide` needs slots that hold the model's whole context.

    Raises:
        InputError: a slot in use or out of range, or a request that is wrong, too long for the engine, or to be ended
            by an id that is never produced.
    """
    slot = _in_range(state, slot)
    if bool(state.used[slot]):
        raise InputError(f"slot: {slot} is in use; harvest and free it first, or take another.")
    (row,) = asking.fit(cfg, [request], state.capacity, state.n_new, overflow, int(state.requests.n_vocab))
    row = replace(
        row, index=arguments.check_count("index", index, 0), sample=arguments.check_count("sample", sample, 0)
    )
    asked = asking.pack([row], 1, asking.width(cfg, row), state.key, tuple(request.stop_ids), 0)
    return _insert(cfg, params, _widened(state, asked), np.int32(slot), asked)


@partial(jax.jit, donate_argnames="state")
def _insert(
    cfg: ModelConfig, params: Params, state: EngineState, slot: jax.Array, asked: decoding.Requests
) -> EngineState:
    width = asked.prompt.shape[1]
    one = decoding.prefill(cfg, params, asked.prompt, capacity=width, n_new=state.n_new, n_top=state.n_top)
    put = partial(_put, slot=slot)
    cacheless = [rows._replace(cache=Cache((), (), rows.cache.length)) for rows in (state.rows, one)]
    return state._replace(
        requests=jax.tree.map(put, state.requests, asked),
        rows=jax.tree.map(put, *cacheless)._replace(cache=map_rows(put, state.rows.cache, one.cache)),
        used=state.used.at[slot].set(True),
    )


@partial(jax.jit, donate_argnames="state")
def step(cfg: ModelConfig, params: Params, state: EngineState, n: jax.Array | int) -> EngineState:
    """Up to n more tokens for every running slot, fewer when one of them ends: its slot can be used again at once.

    Fewer, too, when a window that slides is full, and none before `slide` has cut it.
    """
    running = state.rows.finished == decoding.RUNNING

    def goes_on(rows: decoding.State) -> jax.Array:
        full = running & (rows.cache.length >= state.capacity)
        return running.any() & ((rows.finished == decoding.RUNNING) == running).all() & ~full.any()

    return state._replace(rows=decoding.loop(cfg, params, state.requests, state.rows, n, goes_on))


def slide(cfg: ModelConfig, params: Params, state: EngineState) -> EngineState:
    """The engine without full windows, ready to step. Uses up `state`; looks at the device, so it is not for `jit`."""
    return state._replace(rows=drive.slide(cfg, params, state.requests, state.rows))


def harvest(
    state: EngineState, slot: int, *, tokenizer: Decodes | None = None, stop: str | Sequence[str] = ()
) -> Generation:
    """The answer in a slot whose request has ended.

    Raises:
        InputError: the slot is free, or its request still runs.
    """
    answer = peek(state, slot, tokenizer=tokenizer, stop=stop)
    if answer.finish_reason is None:
        raise InputError(f"slot: the request in {slot} still runs; step until it ends, or peek.")
    return answer


def peek(
    state: EngineState, slot: int, *, tokenizer: Decodes | None = None, stop: str | Sequence[str] = ()
) -> Generation:
    """The answer in a slot so far: of a request that still runs, the finish_reason is None, and the text may end within
    a character. The state is not used up.

    Raises:
        InputError: the slot is free.
    """
    slot = _in_range(state, slot)
    arguments.check_tokenizer(tokenizer)
    stops = arguments.check_stops(stop, tokenizer)
    if not bool(state.used[slot]):
        raise InputError(f"slot: {slot} holds no request.")
    stop_ids = np.asarray(state.requests.stop_ids[slot]).tolist()
    row = answers.arrays(state.rows).row(slot)
    return answers.read(row, stops=stops, stop_ids=stop_ids, tokenizer=tokenizer)


def free(state: EngineState, slot: int) -> EngineState:
    """Empties a slot, whether its request has ended or not.

    Raises:
        InputError: there is no such slot.
    """
    slot = _in_range(state, slot)
    return _free(state, np.int32(slot))


@partial(jax.jit, donate_argnames="state")
def _free(state: EngineState, slot: jax.Array) -> EngineState:
    return state._replace(
        requests=jax.tree.map(partial(_put, slot=slot), state.requests, state.idle),
        rows=state.rows._replace(finished=state.rows.finished.at[slot].set(decoding.LENGTH)),
        used=state.used.at[slot].set(False),
    )


def _in_range(state: EngineState, slot: int) -> int:
    return arguments.check_count("slot", slot, 0, state.slots - 1)


def _widened(state: EngineState, asked: decoding.Requests) -> EngineState:
    """The engine with room for the request's lists of ids."""

    def wide(leaf: jax.Array, one: jax.Array) -> jax.Array:
        shape = (*leaf.shape[:1], *(max(a, b) for a, b in zip(leaf.shape[1:], one.shape[1:], strict=True)))
        return leaf if shape == leaf.shape else _fitted(leaf, shape)

    asked = asked._replace(prompt=state.idle.prompt)  # cut to the capacity
    return state._replace(
        requests=jax.tree.map(wide, state.requests, asked), idle=jax.tree.map(wide, state.idle, asked)
    )


def _put(whole: jax.Array, one: jax.Array, *, slot: jax.Array | int) -> jax.Array:
    """`whole` with the only row of `one` as row `slot`, padded; all of the row, for a NaN left in it would spread."""
    if not whole.ndim or not whole.size:  # what all rows share, and a bigram's empty cache
        return whole
    return lax.dynamic_update_index_in_dim(whole, _fitted(one, (1, *whole.shape[1:])), slot, axis=0)


def _fitted(leaf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Cut or padded to `shape`; ids are padded with -1."""
    if leaf.shape == shape:
        return leaf
    leaf = leaf[tuple(slice(size) for size in shape)]
    fill: Any = -1 if jnp.issubdtype(leaf.dtype, jnp.signedinteger) else 0
    return jnp.pad(leaf, [(0, want - have) for have, want in zip(leaf.shape, shape, strict=True)], constant_values=fill)
