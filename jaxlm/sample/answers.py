"""Answers on the host: read from a state's rows, turned into text, and cut at the strings that end them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.sample import decode as decoding
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.decode import State
from jaxlm.sample.requests import Entry

Reason = Literal["stop", "length", "error"]
REASONS: dict[int, Reason | None] = {
    decoding.RUNNING: None, decoding.STOP: "stop", decoding.LENGTH: "length", decoding.ERROR: "error"
}  # fmt: skip
STRIDE = 8  # tokens decoded between two looks for a stop string


@dataclass(frozen=True)
class Generation:
    """One request's result.

    Attributes:
        tokens: the new ids only; a stop id is the last of them, and with a stop string they end with the token that
            completed it.
        text: `tokens` decoded, without the stop id, and up to the stop string; None without a tokenizer.
        log_probs: of each new token under the model itself, before any filter; nats.
        finish_reason: `stop` (a stop id or string), `length` (max_new_tokens), or `error` (the logits held a NaN, or
            left no token to choose; tokens before that are valid). None: it still runs (`engine.peek`).
        top_log_probs: for each new token the (id, log-probability) of those most likely under the model itself, best
            first, as many as were asked for; None where none were.
    """

    tokens: list[int]
    text: str | None
    log_probs: list[float]
    finish_reason: Reason | None
    top_log_probs: list[list[tuple[int, float]]] | None = None


class Arrays(NamedTuple):
    """The leaves of a state that answers are read from: those of all rows, or of one. Not the cache."""

    tokens: jax.Array
    log_probs: jax.Array
    n_new: jax.Array
    finished: jax.Array
    top_tokens: jax.Array
    top_log_probs: jax.Array

    def row(self, i: int) -> Arrays:
        """Those of row i alone."""
        return Arrays(*(leaf[i] for leaf in self))


def arrays(state: State) -> Arrays:
    """What answers are read from."""
    return Arrays(*(getattr(state, name) for name in Arrays._fields))


def read(
    row: Arrays, *, stops: tuple[str, ...] = (), stop_ids: Sequence[int] = (), tokenizer: Decodes | None = None
) -> Generation:
    """The answer in a row, as far as it has come.

    Args:
        row: of one row.
        stops: strings that end the answer.
        stop_ids: ids that end it.
        tokenizer: decodes it; needed where there are `stops`.
    """
    tokens, log_probs, n_new, finished, top_tokens, top_log_probs = jax.device_get(tuple(row))
    top = tops(top_tokens[:n_new], top_log_probs[:n_new])
    done = Generation(tokens[:n_new].tolist(), None, log_probs[:n_new].tolist(), REASONS[int(finished)], top)
    return done if tokenizer is None else _with_text(done, stops, stop_ids, tokenizer)


def read_group(
    group: list[Entry], rows: Arrays, stops: tuple[str, ...], stop_ids: Sequence[int], tokenizer: Decodes | None
) -> dict[tuple[int, int], Generation]:
    """The answers of a group's rows, by the number of the prompt and the sample."""
    host = Arrays(*jax.device_get(tuple(rows)))
    return {
        (request.index, request.sample): read(host.row(i), stops=stops, stop_ids=stop_ids, tokenizer=tokenizer)
        for i, request in enumerate(group)
    }


def tops(tokens: np.ndarray, log_probs: np.ndarray) -> list[list[tuple[int, float]]] | None:
    """The most likely tokens at each of n places, both [n, M]; None for M = 0."""
    if not tokens.shape[-1]:
        return None
    return [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), log_probs.tolist(), strict=True)]


def find(text: str, stops: tuple[str, ...]) -> int:
    """Where the first stop string starts; -1: nowhere."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return min(found, default=-1)


def end_at_stops(state: State, stops: Sequence[tuple[str, ...]], tokenizer: Decodes) -> State:
    """Finishes the running rows whose text holds one of their stop strings.

    Args:
        state: after some tokens more.
        stops: of each row; rows beyond have none.
        tokenizer: decodes the rows.
    """
    tokens, n_new, finished = (np.asarray(leaf) for leaf in (state.tokens, state.n_new, state.finished))
    marked = finished.copy()
    for row, strings in enumerate(stops):
        looked_for = strings and finished[row] == decoding.RUNNING
        if looked_for and find(tokenizer.decode(tokens[row, : n_new[row]].tolist()), strings) >= 0:
            marked[row] = decoding.STOP
    return state if np.array_equal(marked, finished) else state._replace(finished=jnp.asarray(marked))


def _with_text(done: Generation, stops: tuple[str, ...], stop_ids: Sequence[int], tokenizer: Decodes) -> Generation:
    shown = done.tokens[:-1] if done.finish_reason == "stop" and done.tokens[-1] in stop_ids else done.tokens
    text = tokenizer.decode(shown)
    if find(text, stops) < 0:
        return replace(done, text=text)
    # The fewest tokens whose text holds a stop string: those after it were decoded while nobody looked.
    low, high = 1, len(shown)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if find(tokenizer.decode(shown[:middle]), stops) >= 0 else (middle + 1, high)
    text = tokenizer.decode(shown[:low])
    top = done.top_log_probs and done.top_log_probs[:low]
    return Generation(done.tokens[:low], text[: find(text, stops)], done.log_probs[:low], "stop", top)
