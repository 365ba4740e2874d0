"""`generate`: prompts in, texts out. Batches requests, pads them to buckets, and drives prefill and decode."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params
from jaxlm.sample import decode as decoding
from jaxlm.sample.options import Sampling

MAX_SLOTS = 64
SMALLEST_BUCKET = 16
_STRIDE = 8  # tokens decoded between two looks for a stop string


class Decodes(Protocol):
    """What `generate` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def decode(self, ids: list[int]) -> str: ...


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
    """

    tokens: list[int]
    text: str | None
    log_probs: list[float]
    finish_reason: Literal["stop", "length", "error"]


@dataclass(frozen=True)
class _Request:
    """One prompt with its options, as the host holds it."""

    index: int
    prompt: list[int]
    sampling: Sampling
    max_new: int


def bucket(n: int) -> int:
    """The power of two that a length is padded to, at least 16."""
    return max(SMALLEST_BUCKET, 1 << max(n - 1, 0).bit_length())


def generate(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int] = (),
    stop: str | Sequence[str] = (),
    key: jax.Array | None = None,
    tokenizer: Decodes | None = None,
    slots: int | None = None,
    overflow: Literal["refuse", "crop"] = "refuse",
) -> list[Generation]:
    """Continues prompts.

    Requests are decoded `slots` at a time. A request's prompt is padded to a power of two T >= 16 and its cache to T
    plus a power of two for the new tokens, whatever its neighbours are, and only requests of one T share a batch. So at
    a fixed `slots` a request gets the same tokens alone, in any slot, with any neighbours; at another `slots` the last
    bits of its logits may differ, and with them, rarely, a token.

    Compilations: one prefill and one decoding loop for each pair of T and new-token bucket that occurs, per `slots`:
    at most log2(max_seq_len / 16) + 2 values of T. No option's value compiles anything; more than 16 stop ids, or
    biased and banned ids of one request, do, by powers of two.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`, which is otherwise done on every call.
        prompts: token ids, any lengths from 1.
        sampling: options for all requests, or one for each.
        max_new_tokens: for all requests, or one for each; at least 1.
        stop_ids: ids that end an answer.
        stop: strings that end an answer, found across token boundaries; they need a tokenizer.
        key: typed PRNG key. Request i draws its token at position n with fold_in(fold_in(key, i), n), or with
            fold_in(key(seed), n) where `Sampling.seed` is set. By default `jax.random.key(0)`.
        tokenizer: decodes the answers; ids from its vocab_size on are padding of the model's vocabulary and never
            produced.
        slots: rows decoded together; by default a power of two, at most 64, that holds the prompts.
        overflow: what to do when prompt and new tokens exceed cfg.max_seq_len: refuse, or drop the prompt's first
            tokens.

    Returns:
        One Generation a prompt, in order.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a request longer than the context, lists whose
            lengths differ, a stop string without a tokenizer or an empty one.
    """
    requests = _requests(cfg, prompts, sampling, max_new_tokens, overflow)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if stops and tokenizer is None:
        raise InputError("stop: stop strings need a tokenizer; pass tokenizer=, or stop_ids= instead.")
    if "" in stops:
        raise InputError("stop: a stop string is empty; remove it.")
    for token in stop_ids:
        if not 0 <= token < cfg.vocab_size:
            raise InputError(f"stop_ids: {token} is outside the vocabulary of {cfg.vocab_size} tokens.")
    if slots is None:
        slots = min(MAX_SLOTS, 1 << max(len(requests) - 1, 0).bit_length())
    if slots < 1:
        raise InputError(f"slots: must be at least 1, found {slots}.")

    key = jax.random.key(0) if key is None else key
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise InputError(f"key: expected one typed key (jax.random.key), found {key.dtype} of shape {key.shape}.")
    n_vocab = min(cfg.vocab_size, tokenizer.vocab_size) if tokenizer is not None else cfg.vocab_size
    dparams = decoding.prepare(cfg, params)
    running = []
    for group in _groups(cfg, requests, slots):
        width, room = _width(cfg, group[0]), bucket(max(r.max_new for r in group))
        asked = _pack(group, slots, width, key, tuple(stop_ids), n_vocab)
        state = decoding.prefill(cfg, dparams, asked.prompt, capacity=width + room, n_new=room)
        if stops:
            assert tokenizer is not None
            state = _decode_watching(cfg, dparams, asked, state, stops, tokenizer)
        else:
            state = decoding.decode(cfg, dparams, asked, state, room)
        running.append((group, (state.tokens, state.log_probs, state.n_new, state.finished)))  # not the cache
        if len(running) > 1:  # keep the device busy, but hold no more than two caches
            jax.block_until_ready(running[-2][1])

    out: dict[int, Generation] = {}
    for group, arrays in running:  # after all have been dispatched
        tokens, log_probs, n_new, finished = (np.asarray(array) for array in arrays)
        for row, request in enumerate(group):
            n = int(n_new[row])
            done = Generation(tokens[row, :n].tolist(), None, log_probs[row, :n].tolist(), _REASONS[int(finished[row])])
            out[request.index] = _with_text(done, stops, tuple(stop_ids), tokenizer)
    return [out[i] for i in range(len(requests))]


_REASONS: dict[int, Literal["stop", "length", "error"]] = {
    decoding.STOP: "stop",
    decoding.LENGTH: "length",
    decoding.ERROR: "error",
}


def _requests(
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None,
    max_new_tokens: int | Sequence[int],
    overflow: str,
) -> list[_Request]:
    n = len(prompts)
    options = [sampling or Sampling()] * n if sampling is None or isinstance(sampling, Sampling) else list(sampling)
    wanted = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * n
    for name, given in (("sampling", options), ("max_new_tokens", wanted)):
        if len(given) != n:
            raise InputError(f"{name}: {len(given)} given for {n} prompts; give one, or one for each.")
    out = []
    for i, (prompt, option, max_new) in enumerate(zip(prompts, options, wanted, strict=True)):
        if isinstance(prompt, str):
            raise InputError(f"prompt {i}: expected token ids, found text; encode it with the tokenizer first.")
        ids = [operator.index(token) for token in prompt]
        if not ids:
            raise InputError(f"prompt {i}: is empty; give it at least one token, such as the end-of-text id.")
        for token in ids:
            if not 0 <= token < cfg.vocab_size:
                raise InputError(f"prompt {i}: id {token} is outside the vocabulary of {cfg.vocab_size} tokens.")
        for token in option.edits:
            if token >= cfg.vocab_size:
                raise InputError(f"sampling {i}: id {token} is outside the vocabulary of {cfg.vocab_size} tokens.")
        if max_new < 1:
            raise InputError(f"max_new_tokens: must be at least 1, found {max_new}.")
        if len(ids) + max_new > cfg.max_seq_len:
            if overflow == "refuse" or max_new >= cfg.max_seq_len:
                raise InputError(
                    f"prompt {i}: {len(ids)} tokens and {max_new} new ones exceed the model's context of "
                    f"{cfg.max_seq_len}; shorten one of them, or pass overflow='crop' to drop the prompt's start."
                )
            ids = ids[len(ids) + max_new - cfg.max_seq_len :]
        out.append(_Request(i, ids, option, int(max_new)))
    return out


def _width(cfg: ModelConfig, request: _Request) -> int:
    return min(bucket(len(request.prompt)), cfg.max_seq_len)


def _groups(cfg: ModelConfig, requests: list[_Request], slots: int) -> list[list[_Request]]:
    """Requests of one compiled shape, at most `slots` together. A request's shape is its own, never its neighbours'."""
    by_shape: dict[tuple[int, int], list[_Request]] = {}
    for request in requests:
        by_shape.setdefault((_width(cfg, request), bucket(request.max_new)), []).append(request)
    return [
        group[start : start + slots] for _, group in sorted(by_shape.items()) for start in range(0, len(group), slots)
    ]


def _pack(
    group: list[_Request], slots: int, width: int, key: jax.Array, stop_ids: tuple[int, ...], n_vocab: int
) -> decoding.Requests:
    """The group's arrays, filled up with rows that are not in use."""
    prompt = np.full((slots, width), -1, np.int32)
    for row, request in enumerate(group):
        prompt[row, : len(request.prompt)] = request.prompt
    idle = _Request(0, [], Sampling(), 1)
    rows = group + [idle] * (slots - len(group))

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(r.sampling, name) for r in rows], dtype)

    shape = (slots, bucket(max(len(r.sampling.edits) for r in rows)))
    edit_ids, edit_values = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, r in enumerate(rows):
        for i, (token, value) in enumerate(r.sampling.edits.items()):
            edit_ids[row, i], edit_values[row, i] = token, value
    stops = np.full((slots, bucket(len(stop_ids))), -1, np.int32)
    stops[:, : len(stop_ids)] = stop_ids

    arrays = {
        "prompt": prompt,
        "max_new": np.array([r.max_new for r in rows], np.int32),
        "min_new": column("min_new_tokens", np.int32),
        "temperature": column("temperature"),
        "top_k": column("top_k", np.int32),
        "top_p": column("top_p"),
        "min_p": column("min_p"),
        "repetition": column("repetition_penalty"),
        "presence": column("presence_penalty"),
        "frequency": column("frequency_penalty"),
        "edit_ids": edit_ids,
        "edit_values": edit_values,
        "stop_ids": stops,
        "n_vocab": np.int32(n_vocab),
    }
    return decoding.Requests(key=_keys(rows, key), **jax.device_put(arrays))


@jax.jit
def _fold_all(key: jax.Array, index: jax.Array, seed: jax.Array, seeded: jax.Array) -> jax.Array:
    own = jax.vmap(lambda s: jax.random.key(s, impl=jax.random.key_impl(key)))(seed)
    shared = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    return jax.vmap(jax.numpy.where)(seeded, own, shared)


def _keys(rows: list[_Request], key: jax.Array) -> jax.Array:
    index = np.array([r.index for r in rows], np.uint32)
    seed = np.array([r.sampling.seed or 0 for r in rows], np.uint32)
    return _fold_all(key, index, seed, np.array([r.sampling.seed is not None for r in rows]))


def _decode_watching(
    cfg: ModelConfig,
    params: Params,
    asked: decoding.Requests,
    state: decoding.State,
    stops: tuple[str, ...],
    tokenizer: Decodes,
) -> decoding.State:
    """Decodes a few tokens at a time, and marks rows whose text holds a stop string as finished."""
    for _ in range(0, state.tokens.shape[1], _STRIDE):
        state = decoding.decode(cfg, params, asked, state, _STRIDE)
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
    found = [place for place in map(text.find, stops) if place >= 0]
    return min(found, default=-1)


def _with_text(
    done: Generation, stops: tuple[str, ...], stop_ids: tuple[int, ...], tokenizer: Decodes | None
) -> Generation:
    if tokenizer is None:
        return done
    shown = done.tokens[:-1] if done.finish_reason == "stop" and done.tokens[-1] in stop_ids else done.tokens
    text = tokenizer.decode(shown)
    place = _find(text, stops)
    if place < 0:
        return replace(done, text=text)
    # The fewest tokens whose text holds a stop string: those after it were decoded while nobody looked.
    low, high = 1, len(shown)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _find(tokenizer.decode(shown[:middle]), stops) >= 0 else (middle + 1, high)
    return Generation(done.tokens[:low], text[:place], done.log_probs[:low], "stop")
