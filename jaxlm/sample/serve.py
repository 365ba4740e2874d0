"""`serve`: a queue of requests through the slots of an engine, answers as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params
from jaxlm.sample import decode as decoding
from jaxlm.sample import engine
from jaxlm.sample import requests as asking
from jaxlm.sample.engine import Request
from jaxlm.sample.generate import Generation, _find
from jaxlm.sample.requests import Decodes, bucket


def serve(
    cfg: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    *,
    slots: int,
    capacity: int | None = None,
    n_new: int | None = None,
    key: jax.Array | None = None,
    tokenizer: Decodes | None = None,
    steps: int = 8,
) -> Iterator[tuple[int, Generation]]:
    """Answers requests as slots come free; those beyond `slots` wait their turn.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`.
        requests: a list, which is checked as a whole before any work; or an iterator, taken from when a slot is free.
        slots: requests that decode together.
        capacity: tokens that a slot holds, prompt and answer. A list's own needs by default; an iterator needs it said.
        n_new: tokens that an answer may have; as many as the list needs, or half of the capacity.
        key: as in `generate`; request i draws with fold_in(key, i), or from its own seed.
        tokenizer: decodes the answers, and finds stop strings.
        steps: tokens between two looks for stop strings.

    Yields:
        (i, Generation) for request i, in the order in which they end.

    Raises:
        InputError: something wrong with a request or a size. A wrong request from an iterator is reported after those
            before it have been answered.
    """
    if isinstance(requests, Sequence):
        rows = engine.checked(cfg, requests, capacity, n_new)
        n_new = n_new or bucket(max((r.max_new for r in rows), default=1))
        needed = max((asking.width(cfg, r) for r in rows), default=1) + n_new
        capacity = capacity or (needed if cfg.kind == "bigram" else min(needed, cfg.max_seq_len))
        for request in requests:
            asking.check_ends(cfg, request.stop, (), tokenizer)
    elif capacity is None:
        raise InputError(
            "capacity: say how many tokens a slot holds, since requests from an iterator are not yet known."
        )
    if steps < 1:
        raise InputError(f"steps: must be at least 1, found {steps}.")
    n_vocab = None if tokenizer is None else min(cfg.vocab_size, tokenizer.vocab_size)
    dparams = decoding.prepare(cfg, params)
    state = engine.init(
        cfg, dparams, slots=slots, capacity=capacity, n_new=n_new or max(capacity // 2, 1), key=key, n_vocab=n_vocab
    )
    return _serving(cfg, dparams, state, enumerate(requests), asking.check_key(key), tokenizer, steps)


def _serving(
    cfg: ModelConfig,
    params: Params,
    state: engine.EngineState,
    queue: Iterator[tuple[int, Request]],
    key: jax.Array,
    tokenizer: Decodes | None,
    steps: int,
) -> Iterator[tuple[int, Generation]]:
    held: dict[int, tuple[int, Request]] = {}
    empty, wrong = deque(range(state.slots)), None
    while True:
        while empty and wrong is None and (item := next(queue, None)) is not None:
            index, request = item
            try:
                asking.check_ends(cfg, request.stop, (), tokenizer)
                state = engine.insert(cfg, params, state, empty[0], request, index=index, key=key)
                held[empty.popleft()] = item
            except InputError as error:
                wrong = InputError(f"request {index}: {error}")
        if not held:
            break
        state = engine.step(cfg, params, state, steps)
        if any(request.stop for _, request in held.values()):
            assert tokenizer is not None
            state = _stopped(state, held, tokenizer)
        finished = np.asarray(state.rows.finished)
        for slot in [slot for slot in held if finished[slot] != decoding.RUNNING]:
            index, request = held.pop(slot)
            answer = engine.harvest(state, slot, tokenizer=tokenizer, stop=request.stop)
            state = engine.free(state, slot)
            empty.append(slot)
            yield index, answer
    if wrong is not None:
        raise wrong


def _stopped(state: engine.EngineState, held: dict[int, tuple[int, Request]], tokenizer: Decodes) -> engine.EngineState:
    """Marks the running rows whose text holds one of their stop strings as finished."""
    rows = state.rows
    tokens, n_new, finished = np.asarray(rows.tokens), np.asarray(rows.n_new), np.array(rows.finished)
    for slot, (_, request) in held.items():
        text = tokenizer.decode(tokens[slot, : n_new[slot]].tolist()) if request.stop else ""
        if finished[slot] == decoding.RUNNING and _find(text, request.stop) >= 0:
            finished[slot] = decoding.STOP
    return state._replace(rows=rows._replace(finished=jnp.asarray(finished)))
