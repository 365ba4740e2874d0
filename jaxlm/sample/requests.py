"""Requests on the host: checked, put into groups of one compiled shape, and packed into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.sample import arguments
from jaxlm.sample import decode as decoding
from jaxlm.sample.options import Sampling

SMALLEST_BUCKET = 16
Overflow = Literal["refuse", "crop", "slide"]


@dataclass(frozen=True)
class Request:
    """What one request asks for.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        sampling: its options.
        stop_ids: ids that end the answer.
        stop: a string or strings that end the answer; `serve` looks for them, with a tokenizer.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop: str | tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One answer to be written.

    Attributes:
        index: number of its prompt in the call.
        prompt: ids, as many as the model is to see.
        sampling: its options.
        max_new: tokens wanted at most.
        sample: number among the answers to one prompt.
        slides: prompt and answer may exceed the context, so the window is to slide.
    """

    index: int
    prompt: list[int]
    sampling: Sampling
    max_new: int
    sample: int = 0
    slides: bool = False


def bucket(n: int) -> int:
    """The power of two that a length is padded to, at least 16."""
    return max(SMALLEST_BUCKET, 1 << max(n - 1, 0).bit_length())


def width(cfg: ModelConfig, request: Entry) -> int:
    """What the request's prompt is padded to: a power of two, or the context."""
    return min(bucket(len(request.prompt)), cfg.max_seq_len)


def capacity(cfg: ModelConfig, width: int, room: int) -> int:
    """Places of a cache for prompts of `width` and `room` more tokens: none beyond the context, where no token goes.

    What is guessed past the end of an answer is dropped when it is written, and never looked at.
    """
    return min(width + room, cfg.max_seq_len)


def kept(cfg: ModelConfig) -> int:
    """Tokens that a sliding window goes on with when it is full: half of the context."""
    return max(cfg.max_seq_len // 2, 1)


def check(
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] | None,
    max_new_tokens: int | Sequence[int],
    overflow: str,
    n: int = 1,
    *,
    can_slide: bool = True,
) -> list[Entry]:
    """One request for each of the `n` samples of every prompt, prompt by prompt. See `generate` for the arguments.

    Prompt and new tokens must fit the context together: so a prompt that fills it alone is too long, though its one new
    token would never be fed. One rule for all lengths is easier to state than the place that it saves.

    Args:
        can_slide: the caller has a way to go on when the context is full.

    Raises:
        InputError: what is wrong, with the number of the prompt.
    """
    ways = ("refuse", "crop", "slide") if can_slide else ("refuse", "crop")
    if overflow not in ways:
        only = "" if can_slide or overflow != "slide" else "; only generate, stream and serve can slide"
        raise InputError(f"overflow: must be {', '.join(ways[:-1])} or {ways[-1]}, found {overflow!r}{only}.")
    rows = arguments.check_prompts(cfg, prompts)
    n, each = arguments.check_count("n", n), len(rows)
    options, wanted = arguments.check_sampling(sampling, each), arguments.check_lengths(max_new_tokens, each)
    for name, given in (("sampling", options), ("max_new_tokens", wanted)):
        if len(given) != each:
            raise InputError(f"{name}: {len(given)} given for {each} prompts; give one, or one for each.")
    out = []
    for i, (ids, option, max_new) in enumerate(zip(rows, options, wanted, strict=True)):
        for token in option.edits:
            if token >= cfg.vocab_size:
                raise InputError(f"sampling {i}: id {token} is outside the vocabulary of {cfg.vocab_size} tokens.")
        too_long = len(ids) + max_new > cfg.max_seq_len
        if too_long and (overflow == "refuse" or (overflow == "crop" and max_new >= cfg.max_seq_len)):
            slide = ", or 'slide' to go on with the last tokens when the context is full" if can_slide else ""
            raise InputError(
                f"prompt {i}: {len(ids)} tokens and {max_new} new ones exceed the model's context of "
                f"{cfg.max_seq_len}; shorten one of them, or pass overflow='crop' to drop the prompt's start{slide}."
            )
        if too_long and overflow == "crop":
            ids = ids[len(ids) + max_new - cfg.max_seq_len :]
        elif len(ids) > cfg.max_seq_len:
            ids = ids[-kept(cfg) :]
        slides = len(ids) + max_new > cfg.max_seq_len
        out += [Entry(i, ids, option, max_new, sample, slides) for sample in range(n)]
    return out


def check_request(request: object) -> None:
    """
    Raises:
        InputError: it is none.
    """
    if not isinstance(request, Request):
        raise InputError(f"requests: expected jaxlm.sample.Request, found {arguments.found(request)} among them.")


def fit(
    cfg: ModelConfig, requests: Sequence[Request], capacity: int | None, n_new: int | None, overflow: str, n_vocab: int
) -> list[Entry]:
    """Requests for slots, as `generate` holds them.

    Raises:
        InputError: one is wrong in itself, too long for a slot of `capacity` tokens, `n_new` of them new, or has a stop
            id from `n_vocab` on.
    """
    for request in requests:
        check_request(request)
    wanted = [r.max_new_tokens for r in requests]
    rows = check(cfg, [r.prompt for r in requests], [r.sampling for r in requests], wanted, overflow)
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        if row.slides and capacity is not None and capacity < cfg.max_seq_len:
            raise InputError(
                f"prompt {i}: its window is to slide, which needs capacity={cfg.max_seq_len}, the model's context; "
                f"found {capacity}."
            )
        if not row.slides and capacity is not None and len(row.prompt) + row.max_new > capacity:
            raise InputError(
                f"prompt {i}: {len(row.prompt)} tokens and {row.max_new} new ones exceed a slot's capacity of "
                f"{capacity}."
            )
        if n_new is not None and row.max_new > n_new:
            raise InputError(f"max_new_tokens: {row.max_new} exceeds a slot's room for {n_new} new tokens.")
        arguments.check_stop_ids(cfg, request.stop_ids, n_vocab)
    return rows


def groups(cfg: ModelConfig, requests: list[Entry], slots: int) -> list[list[Entry]]:
    """Requests of one compiled shape, at most `slots` together. A request's shape is its own, never its neighbours'."""
    by_shape: dict[tuple[bool, int, int], list[Entry]] = {}
    for request in requests:
        by_shape.setdefault((request.slides, width(cfg, request), bucket(request.max_new)), []).append(request)
    return [
        group[start : start + slots] for _, group in sorted(by_shape.items()) for start in range(0, len(group), slots)
    ]


def pack(
    group: list[Entry], slots: int, width: int, key: jax.Array, stop_ids: tuple[int, ...], n_vocab: int
) -> decoding.Requests:
    """The group's arrays, filled up with rows that are not in use.

    Args:
        group: requests, at most `slots`.
        slots: B.
        width: T, what prompts are padded to.
        key: the call's.
        stop_ids: ids that end an answer.
        n_vocab: ids from here on are never produced.
    """
    prompt = np.full((slots, width), -1, np.int32)
    for row, request in enumerate(group):
        prompt[row, : len(request.prompt)] = request.prompt
    # Greedy, so that a batch of greedy requests with rows to spare still takes the sampler's short way.
    rows = group + [Entry(0, [], Sampling(temperature=0), 1)] * (slots - len(group))

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
        "typical_p": column("typical_p"),
        "repetition": column("repetition_penalty"),
        "presence": column("presence_penalty"),
        "frequency": column("frequency_penalty"),
        "no_repeat_ngram": column("no_repeat_ngram", np.int32),
        "edit_ids": edit_ids,
        "edit_values": edit_values,
        "stop_ids": stops,
        "n_vocab": np.int32(n_vocab),
    }
    return decoding.Requests(key=_keys(rows, key), **jax.device_put(arrays))


def _keys(rows: list[Entry], key: jax.Array) -> jax.Array:
    index = np.array([r.index for r in rows], np.uint32)
    seed = np.array([r.sampling.seed or 0 for r in rows], np.uint32)
    sample = np.array([r.sample for r in rows], np.uint32)
    return _fold_all(key, index, seed, np.array([r.sampling.seed is not None for r in rows]), sample)


@jax.jit
def _fold_all(key: jax.Array, index: jax.Array, seed: jax.Array, seeded: jax.Array, sample: jax.Array) -> jax.Array:
    own = jax.vmap(lambda s: jax.random.key(s, impl=jax.random.key_impl(key)))(seed)
    shared = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    first = jax.vmap(jax.numpy.where)(seeded, own, shared)
    # From the top of the range, which no position reaches; the first sample is the one that n = 1 would give.
    return jax.vmap(jax.numpy.where)(sample > 0, jax.vmap(jax.random.fold_in)(first, 0 - sample), first)
