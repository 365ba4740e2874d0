"""Beam search: the most likely continuations of prompts, over the key/value cache, in one compiled loop.

Every step extends each of a prompt's n beams by every token and ranks all extensions by their total log-probability.
Those among the n best that end, by a stop id or at the length limit, become hypotheses; the n best others go on as
beams. At most n hypotheses are kept, by score:

    score = log_prob / length ** length_penalty

where log_prob is the sum of the new tokens' log-probabilities under the model (nats), and length counts the new tokens,
the stop id among them, but not the prompt. Equal totals rank by beam, then by token id.

Prompts search side by side, P at a time, each as if alone: the rows of the cache are the P * n beams, prompt by prompt.
Windows do not slide here: a score would add up log-probabilities given different pasts.

Source: Wu et al. (arXiv 1609.08144), section 7, with the penalty in the simple form that transformers uses.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Cache, Params, forward, unembed
from jaxlm.model.cache import map_rows
from jaxlm.sample import arguments
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.arguments import Decodes
from jaxlm.sample.requests import bucket

MAX_SLOTS = 8


@dataclass(frozen=True)
class Hypothesis:
    """One continuation that beam search found.

    Attributes:
        tokens: the new ids; a stop id is the last of them.
        text: `tokens` decoded, without the stop id; None without a tokenizer.
        score: `log_prob / len(tokens) ** length_penalty`, what hypotheses are ranked by.
        log_prob: of the tokens together under the model, in nats.
        finish_reason: `stop` (a stop id), `length` (max_new_tokens), or `error`: the logits left nothing to choose.
    """

    tokens: list[int]
    text: str | None
    score: float
    log_prob: float
    finish_reason: Literal["stop", "length", "error"]


class _Ended(NamedTuple):
    """The best hypotheses so far, best first; a score of -inf marks a free place.

    Attributes:
        score, total: float32[P, n].
        tokens: int32[P, n, N].
        length: int32[P, n].
        stopped: bool[P, n], by a stop id.
    """

    score: jax.Array
    total: jax.Array
    tokens: jax.Array
    length: jax.Array
    stopped: jax.Array


class _Beams(NamedTuple):
    """What runs, best first.

    Attributes:
        last: int32[P, n], the token to be fed next.
        total: float32[P, n], log-probability of the new tokens; -inf for a place that no beam fills.
        tokens: int32[P, n, N], -1 after the end.
        ended: the hypotheses.
    """

    last: jax.Array
    total: jax.Array
    tokens: jax.Array
    ended: _Ended


class _Options(NamedTuple):
    """What was asked for, as data: no value of it compiles anything."""

    max_new: jax.Array  # int32[]
    length_penalty: jax.Array  # float32[]
    early: jax.Array  # bool[]
    stop_ids: jax.Array  # int32[E], -1 is padding
    n_vocab: jax.Array  # int32[]


def beam_search(
    cfg: ModelConfig,
    params: Params,
    prompt: Sequence[int],
    *,
    n_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    n_best: int = 1,
    stop_ids: Sequence[int] = (),
    tokenizer: Decodes | None = None,
    overflow: Literal["refuse", "crop"] = "refuse",
) -> list[Hypothesis]:
    """The best continuations of one prompt: what `beam_searches` finds for it, which says all else."""
    (found,) = beam_searches(
        cfg, params, [prompt], n_beams=n_beams, max_new_tokens=max_new_tokens, length_penalty=length_penalty,
        early_stopping=early_stopping, n_best=n_best, stop_ids=stop_ids, tokenizer=tokenizer, overflow=overflow,
    )  # fmt: skip
    return found


def beam_searches(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    n_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    n_best: int = 1,
    stop_ids: Sequence[int] = (),
    tokenizer: Decodes | None = None,
    slots: int | None = None,
    overflow: Literal["refuse", "crop"] = "refuse",
) -> list[list[Hypothesis]]:
    """The continuations with the highest scores that `n_beams` beams find, for each prompt.

    With `n_beams` of at least V ** max_new_tokens nothing is ever cut, and the result is exact. Compiled once for each
    pair of prompt bucket and new-token bucket (as `generate` has them), `slots`, `n_beams`, and power of two of stop
    ids. At fixed `slots` and `n_beams` a prompt's result is the same with any neighbours.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`, which is otherwise done on every call.
        prompts: token ids, any lengths from 1.
        n_beams: n, beams that run and hypotheses that are kept, for each prompt.
        max_new_tokens: longest continuation; a beam that reaches it is a hypothesis.
        length_penalty: 0 ranks by log-probability; above 0 favours longer continuations, below 0 shorter ones.
        early_stopping: True ends once n hypotheses are there. False goes on until no beam can still reach a score
            above the worst of them; then the result is the same as without any stopping before max_new_tokens.
        n_best: hypotheses returned at most, best first; at most n_beams.
        stop_ids: ids that end a continuation.
        tokenizer: decodes the tokens; ids from its vocab_size on are never produced.
        slots: P, prompts that search together, with n_beams rows each; by default a power of two, at most 8, that holds
            all.
        overflow: as in `generate`, but for `slide`.

    Returns:
        For each prompt up to n_best hypotheses, best first: fewer where the vocabulary does not hold so many. A beam
        whose logits hold a NaN is dropped; when that leaves no hypothesis, there is one of no tokens with
        finish_reason `error`.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a request longer than the context, or an option out
            of range.
    """
    arguments.check_cfg(cfg)
    n_beams, n_best = arguments.check_count("n_beams", n_beams), arguments.check_count("n_best", n_best)
    if n_best > n_beams:
        raise InputError(f"n_best: must be at most n_beams={n_beams}, found {n_best}.")
    if n_beams * cfg.vocab_size >= 2**31:
        raise InputError(f"n_beams: {n_beams} beams times {cfg.vocab_size} tokens are too many to rank; use fewer.")
    if not isinstance(length_penalty, numbers.Real) or not math.isfinite(length_penalty):
        raise InputError(f"length_penalty: must be a finite number, found {arguments.found(length_penalty)}.")
    if not isinstance(early_stopping, bool):
        raise InputError(f"early_stopping: must be True or False, found {arguments.found(early_stopping)}.")
    max_new_tokens = arguments.check_count("max_new_tokens", max_new_tokens)
    requests = asking.check(cfg, prompts, None, max_new_tokens, overflow, can_slide=False)
    arguments.check_tokenizer(tokenizer)
    _, stop_ids = arguments.check_ends(cfg, (), stop_ids, tokenizer)
    slots = arguments.check_slots(slots, len(requests), MAX_SLOTS)

    ends = sorted(set(stop_ids))
    padded = np.full(1 << max(len(ends) - 1, 0).bit_length(), -1, np.int32)
    padded[: len(ends)] = ends
    given = np.int32(max_new_tokens), np.float32(length_penalty), np.bool_(early_stopping)
    options = _Options(*jax.device_put((*given, padded, np.int32(arguments.real_vocab(cfg, tokenizer)))))
    dparams = decoding.prepare(cfg, params)
    out: dict[int, list[Hypothesis]] = {}
    for group in asking.groups(cfg, requests, slots):
        rows = np.full((slots, asking.width(cfg, group[0])), -1, np.int32)
        for row, request in zip(rows, group, strict=False):
            row[: len(request.prompt)] = request.prompt
        room = bucket(max_new_tokens)
        found: _Ended = jax.device_get(_search(cfg, dparams, jnp.asarray(rows), options, n=n_beams, room=room))
        for i, request in enumerate(group):
            mine = _Ended(*(leaf[i] for leaf in found))
            best = (place for place in range(n_best) if mine.score[place] > -math.inf)
            out[request.index] = [_read(mine, place, tokenizer) for place in best]
    nothing = Hypothesis([], None if tokenizer is None else "", -math.inf, -math.inf, "error")
    return [out[i] or [nothing] for i in range(len(requests))]


def _read(found: _Ended, place: int, tokenizer: Decodes | None) -> Hypothesis:
    tokens, stopped = found.tokens[place, : found.length[place]].tolist(), bool(found.stopped[place])
    text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if stopped else tokens)
    score, total = float(found.score[place]), float(found.total[place])
    return Hypothesis(tokens, text, score, total, "stop" if stopped else "length")


@partial(jax.jit, static_argnames=("n", "room"))
def _search(cfg: ModelConfig, params: Params, prompt: jax.Array, options: _Options, *, n: int, room: int) -> _Ended:
    batch = prompt.shape[0]
    capacity = asking.capacity(cfg, prompt.shape[1], room)
    start = decoding.prefill(cfg, params, prompt, capacity=capacity, n_new=room)
    none = jnp.full((batch, n), -jnp.inf, jnp.float32)
    tokens = jnp.full((batch, n, room), -1, jnp.int32)
    in_use = start.finished == decoding.RUNNING
    beams = _Beams(
        last=jnp.repeat(start.last[:, None], n, axis=1),
        total=none.at[:, 0].set(jnp.where(in_use, 0.0, -jnp.inf)),  # all beams are the same: only one may be extended
        tokens=tokens,
        ended=_Ended(none, none, tokens, jnp.zeros((batch, n), jnp.int32), jnp.zeros((batch, n), bool)),
    )

    def runs(step: jax.Array, b: _Beams) -> jax.Array:
        """bool[P]: which prompts go on."""
        # Totals only fall, so a beam scores at most its total over the length that serves it best.
        length = jnp.where(options.length_penalty > 0, options.max_new, step + 1)
        reach = b.total.max(-1) / length.astype(jnp.float32) ** options.length_penalty
        worst = b.ended.score.min(-1)  # -inf while a place is free
        done = (worst > -jnp.inf) & (options.early | (worst >= reach))
        return (step < options.max_new) & (b.total.max(-1) > -jnp.inf) & ~done

    def body(carry: tuple[jax.Array, Cache, _Beams]) -> tuple[jax.Array, Cache, _Beams]:
        step, cache, b = carry
        hidden, grown = forward(cfg, params, b.last.reshape(-1, 1), cache=cache)
        assert grown is not None
        log_probs = jax.nn.log_softmax(unembed(cfg, params, hidden[:, 0]), axis=-1).reshape(batch, n, -1)
        parent, extended = jax.vmap(partial(_extend, options, step + 1))(b, log_probs)
        active = runs(step, b)
        b = jax.tree.map(lambda new, old: _where(active, new, old), extended, b)
        return step + 1, _rows(grown, (jnp.arange(batch)[:, None] * n + parent).reshape(-1)), b

    cache = _rows(start.cache, jnp.repeat(jnp.arange(batch), n))
    begin = (jnp.int32(0), cache, beams)
    return lax.while_loop(lambda carry: runs(carry[0], carry[2]).any(), body, begin)[2].ended


def _extend(options: _Options, step: jax.Array, b: _Beams, log_probs: jax.Array) -> tuple[jax.Array, _Beams]:
    """One prompt's beams after their `step`-th token, and which beam each was before: int32[n].

    Args:
        options: what was asked for.
        step: int32[], tokens then.
        b: of one prompt, without the leading axis P.
        log_probs: float32[n, V], of what comes next.
    """
    n, vocab = log_probs.shape
    usable = ~jnp.isnan(log_probs) & (jnp.arange(vocab) < options.n_vocab)
    ranked = jnp.where(usable, b.total[:, None] + log_probs, -jnp.inf)

    # Even if the best extensions all stop, n others are among so many.
    total, flat = lax.top_k(ranked.reshape(-1), min(n * (1 + options.stop_ids.shape[0]), n * vocab))
    parent, token = flat // vocab, flat % vocab
    stops = (token[:, None] == options.stop_ids).any(-1)
    ends = stops | (step == options.max_new)
    tokens = b.tokens[parent].at[:, step - 1].set(token)

    among_best = jnp.arange(total.shape[0]) < n
    score = jnp.where(ends & among_best, total / step.astype(jnp.float32) ** options.length_penalty, -jnp.inf)
    new = _Ended(score, total, tokens, jnp.full_like(token, step), stops)
    both = jax.tree.map(lambda held, more: jnp.concatenate([held, more]), b.ended, new)
    _, kept = lax.top_k(both.score, n)

    total, place = lax.top_k(jnp.where(ends, -jnp.inf, total), n)
    ended = jax.tree.map(lambda leaf: leaf[kept], both)
    return parent[place], _Beams(token[place], total, tokens[place], ended)


def _where(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row i is row rows[i]: whole rows, since with `key_offset` a key lies one place on."""
    return map_rows(lambda leaf: leaf[rows] if leaf.size else leaf, cache)  # a bigram's keys are empty: [0, B, ...]
