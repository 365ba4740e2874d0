"""`serve`: a queue of requests through the slots of an engine, answers as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params
from jaxlm.sample import answers, arguments, engine
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.answers import Generation
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.engine import EngineState
from jaxlm.sample.requests import Overflow, Request, bucket


def serve(
    cfg: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    *,
    slots: int,
    capacity: int | None = None,
    n_new: int | None = None,
    n: int = 1,
    key: jax.Array | int | None = None,
    tokenizer: Decodes | None = None,
    overflow: Overflow = "refuse",
    top_log_probs: int = 0,
    steps: int = answers.STRIDE,
) -> Iterator[tuple[int, Generation]]:
    """Answers requests as slots come free; those beyond `slots` wait their turn.

    The answers are those of `generate` for the same arguments, but for the rounding of its other shapes.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`.
        requests: a list, which is checked as a whole before any work; or an iterator, taken from when a slot is free.
        slots: requests that decode together.
        capacity: tokens that a slot holds, prompt and answer. A list's own needs by default; an iterator needs it said.
        n_new: tokens that an answer may have; as many as the list needs, or half of the capacity.
        n: samples of each request, each in a slot of its own.
        key: as in `generate`; request i draws with fold_in(key, i), or from its own seed.
        tokenizer: decodes the answers, and finds stop strings.
        overflow: as in `generate`; `slide` needs a capacity of the model's context, which a list then gets by default.
        top_log_probs: most likely tokens to report at each new one.
        steps: tokens between two looks for stop strings.

    Yields:
        (place, Generation) in the order in which they end. The place is that in `generate`'s list: i for request i, or
        i * n + j for its sample j.

    Raises:
        InputError: something wrong with a request or a size. A wrong request from an iterator is reported after those
            before it have been answered.
    """
    arguments.check_cfg(cfg)
    arguments.check_tokenizer(tokenizer)
    for name, size in (("slots", slots), ("capacity", capacity), ("n_new", n_new), ("steps", steps), ("n", n)):
        if size is not None:
            arguments.check_count(name, size)
    if not isinstance(requests, Iterable):
        found = arguments.found(requests)
        raise InputError(f"requests: expected a list or an iterator of jaxlm.sample.Request, found {found}.")
    n_vocab = arguments.real_vocab(cfg, tokenizer)
    if isinstance(requests, Sequence):
        rows = asking.fit(cfg, requests, capacity, n_new, overflow, n_vocab)
        n_new = n_new or bucket(max((r.max_new for r in rows), default=1))
        needed = max((asking.width(cfg, r) for r in rows), default=1) + n_new
        if any(r.slides for r in rows):
            needed = cfg.max_seq_len
        capacity = capacity or (needed if cfg.kind == "bigram" else min(needed, cfg.max_seq_len))
        for request in requests:
            arguments.check_stops(request.stop, tokenizer)
    elif capacity is None:
        raise InputError(
            "capacity: say how many tokens a slot holds, since requests from an iterator are not yet known."
        )
    arguments.check_count("top_log_probs", top_log_probs, 0, cfg.vocab_size)
    params = decoding.prepare(cfg, params)
    state = engine.init(
        cfg, params, slots=slots, capacity=capacity, n_new=n_new or max(capacity // 2, 1), key=key,
        n_vocab=n_vocab, n_top=top_log_probs,
    )  # fmt: skip
    insert = partial(engine.insert, cfg, params, overflow=overflow)

    def advance(state: EngineState) -> EngineState:
        return engine.step(cfg, params, engine.slide(cfg, params, state) if overflow == "slide" else state, steps)

    queue = (_Waiting(i, j, i * n + j, request) for i, request in enumerate(requests) for j in range(n))
    return _serving(state, queue, insert, advance, tokenizer)


class _Waiting(NamedTuple):
    """An answer to be written: its request's number, its own among the request's, and its place among all."""

    number: int
    sample: int
    place: int
    request: Request


def _serving(
    state: EngineState,
    queue: Iterator[_Waiting],
    insert: Callable[..., EngineState],
    advance: Callable[[EngineState], EngineState],
    tokenizer: Decodes | None,
) -> Iterator[tuple[int, Generation]]:
    held: dict[int, tuple[_Waiting, tuple[str, ...]]] = {}  # by slot, with its stop strings
    empty, wrong = deque(range(state.slots)), None
    while True:
        while empty and wrong is None and (item := next(queue, None)) is not None:
            try:
                asking.check_request(item.request)
                ends = arguments.check_stops(item.request.stop, tokenizer)
                state = insert(state, empty[0], item.request, index=item.number, sample=item.sample)
                held[empty.popleft()] = item, ends
            except InputError as error:
                wrong = InputError(f"request {item.number}: {error}")
        if not held:
            break
        state = advance(state)
        stops = [held[slot][1] if slot in held else () for slot in range(state.slots)]
        if tokenizer is not None and any(stops):
            state = state._replace(rows=answers.end_at_stops(state.rows, stops, tokenizer))
        finished = np.asarray(state.rows.finished)
        for slot in [slot for slot in held if finished[slot] != decoding.RUNNING]:
            done, ends = held.pop(slot)
            answer = engine.harvest(state, slot, tokenizer=tokenizer, stop=ends)
            state = engine.free(state, slot)
            empty.append(slot)
            yield done.place, answer
    if wrong is not None:
        raise wrong
