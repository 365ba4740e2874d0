"""`generate`: prompts in, texts out. Requests in batches, a look for stop strings now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params
from jaxlm.sample import decode as decoding
from jaxlm.sample import drive
from jaxlm.sample import requests as asking
from jaxlm.sample.options import Sampling
from jaxlm.sample.requests import Decodes, Overflow

MAX_SLOTS = 64
_STRIDE = 8  # tokens decoded between two looks for a stop string


@dataclass(frozen=True)
class Generation:
    """One request's result.

    Attributes:
        tokens: the new ids only; a stop id is the last of them, and with a stop string they end with the token that
            completed it.
        text: `tokens` decoded, without the stop id, and up to the stop string; None without a tokenizer.
        log_probs: of each new token under the model itself, before any filter; nats.
        finish_reason: `stop` (a stop id or string), `length` (max_new_tokens), or `error` (the logits held a NaN, or
            left no token to choose; tokens before that are valid).
        top_log_probs: for each new token the (id, log-probability) of those most likely under the model itself, best
            first, as many as `generate` was asked for; None where it was not.
    """

    tokens: list[int]
    text: str | None
    log_probs: list[float]
    finish_reason: Literal["stop", "length", "error"]
    top_log_probs: list[list[tuple[int, float]]] | None = None


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int | Sequence[int],
    n: int = 1,
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    key: jax.Array | None = None,
    tokenizer: Decodes | None = None,
    slots: int | None = None,
    overflow: Overflow = "refuse",
    top_log_probs: int = 0,
) -> list[Generation]:
    """Continues prompts.

    Requests are decoded `slots` at a time. A request's prompt is padded to a power of two T >= 16 and its cache to T
    plus a power of two for the new tokens, whatever its neighbours are, and only requests of one T share a batch. So at
    a fixed `slots` a request gets the same tokens alone, in any slot, with any neighbours; at another `slots` the last
    bits of its logits may differ, and with them, rarely, a token.

    Compilations: one prefill and one decoding loop for each pair of T and new-token bucket that occurs, per `slots`:
    at most log2(max_seq_len / 16) + 2 values of T. No option's value compiles anything; more than 16 stop ids, or
    biased and banned ids of one request, do, by powers of two, and so does each `top_log_probs`. Requests that slide
    compile their own, and one prefill of the window.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`, which is otherwise done on every call.
        prompts: token ids, any lengths from 1.
        sampling: options for all prompts, or one for each.
        max_new_tokens: for all prompts, or one for each; at least 1.
        n: samples of each prompt. Each is a row of its own, with its own prefill (which costs nothing where rows of the
            batch would stand empty otherwise).
        stop_ids: ids that end an answer.
        stop: strings that end an answer, found across token boundaries; they need a tokenizer.
        key: typed PRNG key. Prompt i draws its token at position p with fold_in(fold_in(key, i), p), or with
            fold_in(key(seed), p) where `Sampling.seed` is set; positions count from the prompt's first token. Sample j
            of a prompt folds 2**32 - j into that key first, but for j = 0: more samples change none of those before.
            By default `jax.random.key(0)`.
        tokenizer: decodes the answers; ids from its vocab_size on are padding of the model's vocabulary and never
            produced.
        slots: rows decoded together; by default a power of two, at most 64, that holds all samples.
        overflow: what to do when prompt and new tokens exceed C = cfg.max_seq_len. `refuse`: an error. `crop`: drop the
            prompt's first tokens. `slide`: see as many of the last tokens as fit; whenever they would be more than C,
            go on with the last C // 2, at positions from 0. A prompt of more than C tokens is cut to C // 2 at once,
            for the penalties too; they see all of the answer.
        top_log_probs: most likely tokens to report at each new one.

    Returns:
        One Generation a sample: n of the first prompt, n of the second, and so on.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a request longer than the context, lists whose
            lengths differ, a stop string without a tokenizer or an empty one, a number out of range.
    """
    requests = asking.check(cfg, prompts, sampling, max_new_tokens, overflow, n)
    stops = asking.check_ends(cfg, stop, stop_ids, tokenizer)
    if slots is None:
        slots = min(MAX_SLOTS, 1 << max(len(requests) - 1, 0).bit_length())
    if slots < 1:
        raise InputError(f"slots: must be at least 1, found {slots}.")
    if not 0 <= top_log_probs <= cfg.vocab_size:
        raise InputError(f"top_log_probs: must be between 0 and {cfg.vocab_size}, found {top_log_probs}.")

    key = asking.check_key(key)
    n_vocab = min(cfg.vocab_size, tokenizer.vocab_size) if tokenizer is not None else cfg.vocab_size
    dparams = decoding.prepare(cfg, params)
    running = []
    for group in asking.groups(cfg, requests, slots):
        asked, state = drive.start(
            cfg, dparams, group, slots=slots, key=key, stop_ids=tuple(stop_ids), n_vocab=n_vocab, n_top=top_log_probs
        )
        state = _finish(cfg, dparams, asked, state, group[0].slides, stops, tokenizer)
        answers = (state.tokens, state.log_probs, state.n_new, state.finished, state.top_tokens, state.top_log_probs)
        running.append((group, answers))  # not the cache
        if len(running) > 1:  # keep the device busy, but hold no more than two caches
            jax.block_until_ready(running[-2][1])

    out: dict[tuple[int, int], Generation] = {}
    for group, arrays in running:  # after all have been dispatched
        host = [np.asarray(array) for array in arrays]
        for row, request in enumerate(group):
            done = _read(*(array[row] for array in host))
            out[request.index, request.sample] = _with_text(done, stops, tuple(stop_ids), tokenizer)
    return [out[place] for place in sorted(out)]


_REASONS: dict[int, Literal["stop", "length", "error"]] = {
    decoding.STOP: "stop",
    decoding.LENGTH: "length",
    decoding.ERROR: "error",
}


def _read(
    tokens: np.ndarray,
    log_probs: np.ndarray,
    n_new: np.ndarray,
    finished: np.ndarray,
    top_tokens: np.ndarray,
    top_log_probs: np.ndarray,
) -> Generation:
    """A row of the state, without text."""
    n = int(n_new)
    top = None
    if top_tokens.shape[-1]:
        both = zip(top_tokens[:n].tolist(), top_log_probs[:n].tolist(), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in both]
    return Generation(tokens[:n].tolist(), None, log_probs[:n].tolist(), _REASONS[int(finished)], top)


def _finish(
    cfg: ModelConfig,
    params: Params,
    asked: decoding.Requests,
    state: decoding.State,
    slides: bool,
    stops: tuple[str, ...],
    tokenizer: Decodes | None,
) -> decoding.State:
    """Decodes to the end; with stop strings a few tokens at a time, marking rows whose text holds one as finished."""
    room = state.tokens.shape[1]
    if not stops:
        return drive.advance(cfg, params, asked, state, room, slides=slides)
    assert tokenizer is not None
    for _ in range(0, room, _STRIDE):
        state = drive.advance(cfg, params, asked, state, _STRIDE, slides=slides)
        tokens, n_new = np.asarray(state.tokens), np.asarray(state.n_new)
        finished = np.array(state.finished)
        for row in np.flatnonzero(finished == decoding.RUNNING):
            if _find(tokenizer.decode(tokens[row, : n_new[row]].tolist()), stops) >= 0:
                finished[row] = decoding.STOP
        state = state._replace(finished=jax.numpy.asarray(finished))
        if not (finished == decoding.RUNNING).any():
            break
    return state


def _find(text: str, stops: tuple[str, ...]) -> int:
    """Where the first stop string starts; -1: nowhere."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return min(found, default=-1)


def _with_text(
    done: Generation, stops: tuple[str, ...], stop_ids: tuple[int, ...], tokenizer: Decodes | None
) -> Generation:
    if tokenizer is None:
        return done
    shown = done.tokens[:-1] if done.finish_reason == "stop" and done.tokens[-1] in stop_ids else done.tokens
    text = tokenizer.decode(shown)
    if _find(text, stops) < 0:
        return replace(done, text=text)
    # The fewest tokens whose text holds a stop string: those after it were decoded while nobody looked.
    low, high = 1, len(shown)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _find(tokenizer.decode(shown[:middle]), stops) >= 0 else (middle + 1, high)
    text = tokenizer.decode(shown[:low])
    top = done.top_log_probs and done.top_log_probs[:low]
    return Generation(done.tokens[:low], text[: _find(text, stops)], done.log_probs[:low], "stop", top)
