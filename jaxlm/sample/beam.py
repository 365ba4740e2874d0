"""Beam search: the most likely continuations of one prompt, over the key/value cache, in one compiled loop.

Every step extends each of the n beams by every token and ranks all extensions by their total log-probability. Those
among the n best that end, by a stop id or at the length limit, become hypotheses; the n best others go on as beams. At
most n hypotheses are kept, by score:

    score = log_prob / length ** length_penalty

where log_prob is the sum of the new tokens' log-probabilities under the model (nats), and length counts the new tokens,
the stop id among them, but not the prompt. Equal totals rank by beam, then by token id.

Source: Wu et al. (arXiv 1609.08144), section 7, with the penalty in the simple form that transformers uses.
"""

from __future__ import annotations

import math
import operator
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
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking
from jaxlm.sample.requests import Decodes, bucket


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
        score, total: float32[n].
        tokens: int32[n, N].
        length: int32[n].
        stopped: bool[n], by a stop id.
    """

    score: jax.Array
    total: jax.Array
    tokens: jax.Array
    length: jax.Array
    stopped: jax.Array


class _Beams(NamedTuple):
    """What runs, best first.

    Attributes:
        step: int32[], new tokens so far.
        cache: of n rows, without the last token of each.
        last: int32[n], the token to be fed next.
        total: float32[n], log-probability of the new tokens; -inf for a place that no beam fills.
        tokens: int32[n, N], -1 after the end.
        ended: the hypotheses.
    """

    step: jax.Array
    cache: Cache
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
) -> list[Hypothesis]:
    """The continuations with the highest scores that `n_beams` beams find.

    With `n_beams` of at least V ** max_new_tokens nothing is ever cut, and the result is exact. Compiled once for each
    pair of prompt bucket and new-token bucket (as `generate` has them), `n_beams`, and power of two of stop ids.

    Args:
        cfg: the model.
        params: from `init`, or better from `prepare`, which is otherwise done on every call.
        prompt: token ids, at least one.
        n_beams: n, beams that run and hypotheses that are kept.
        max_new_tokens: longest continuation; a beam that reaches it is a hypothesis.
        length_penalty: 0 ranks by log-probability; above 0 favours longer continuations, below 0 shorter ones.
        early_stopping: True ends once n hypotheses are there. False goes on until no beam can still reach a score
            above the worst of them; then the result is the same as without any stopping before max_new_tokens.
        n_best: hypotheses returned at most, best first; at most n_beams.
        stop_ids: ids that end a continuation.
        tokenizer: decodes the tokens; ids from its vocab_size on are never produced.

    Returns:
        Up to n_best hypotheses, best first: fewer where the vocabulary does not hold so many. A beam whose logits hold
        a NaN is dropped; when that leaves no hypothesis, there is one of no tokens with finish_reason `error`.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, a request longer than the context, or an option out
            of range.
    """
    n_beams, n_best = _count("n_beams", n_beams), _count("n_best", n_best)
    if n_best > n_beams:
        raise InputError(f"n_best: must be at most n_beams={n_beams}, found {n_best}.")
    if n_beams * cfg.vocab_size >= 2**31:
        raise InputError(f"n_beams: {n_beams} beams times {cfg.vocab_size} tokens are too many to rank; use fewer.")
    if not isinstance(length_penalty, int | float) or not math.isfinite(length_penalty):
        raise InputError(f"length_penalty: must be a finite number, found {length_penalty!r}.")
    if not isinstance(early_stopping, bool):
        raise InputError(f"early_stopping: must be True or False, found {early_stopping!r}.")
    asking.check_ends(cfg, (), stop_ids, tokenizer)
    (request,) = asking.check(cfg, [prompt], None, max_new_tokens, "refuse")

    row = np.full((1, asking.width(cfg, request)), -1, np.int32)
    row[0, : len(request.prompt)] = request.prompt
    ends = sorted(set(stop_ids))
    padded = np.full(1 << max(len(ends) - 1, 0).bit_length(), -1, np.int32)
    padded[: len(ends)] = ends
    n_vocab = cfg.vocab_size if tokenizer is None else min(cfg.vocab_size, tokenizer.vocab_size)
    options = _Options(
        *jax.device_put(
            (np.int32(request.max_new), np.float32(length_penalty), np.bool_(early_stopping), padded, np.int32(n_vocab))
        )
    )
    room = bucket(request.max_new)
    found: _Ended = jax.device_get(
        _search(cfg, decoding.prepare(cfg, params), jnp.asarray(row), options, n=n_beams, room=room)
    )

    out = []
    for i in range(n_best):
        if found.score[i] == -math.inf:
            break
        tokens = found.tokens[i, : found.length[i]].tolist()
        stopped = bool(found.stopped[i])
        text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if stopped else tokens)
        score, total = float(found.score[i]), float(found.total[i])
        out.append(Hypothesis(tokens, text, score, total, "stop" if stopped else "length"))
    return out or [Hypothesis([], None if tokenizer is None else "", -math.inf, -math.inf, "error")]


def _count(name: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name}: must be an integer, found {value!r}.") from error
    if value < 1:
        raise InputError(f"{name}: must be at least 1, found {value}.")
    return value


@partial(jax.jit, static_argnames=("n", "room"))
def _search(cfg: ModelConfig, params: Params, prompt: jax.Array, options: _Options, *, n: int, room: int) -> _Ended:
    start = decoding.prefill(cfg, params, prompt, capacity=prompt.shape[1] + room, n_new=room)
    none = jnp.full(n, -jnp.inf, jnp.float32)
    tokens = jnp.full((n, room), -1, jnp.int32)
    beams = _Beams(
        step=jnp.int32(0),
        cache=_rows(start.cache, jnp.zeros(n, jnp.int32)),
        last=jnp.repeat(start.last, n),
        total=none.at[0].set(0.0),  # all rows are the same: only one of them may be extended
        tokens=tokens,
        ended=_Ended(none, none, tokens, jnp.zeros(n, jnp.int32), jnp.zeros(n, bool)),
    )

    def goes_on(b: _Beams) -> jax.Array:
        # Totals only fall, so a beam scores at most its total over the length that serves it best.
        length = jnp.where(options.length_penalty > 0, options.max_new, b.step + 1)
        reach = b.total.max() / length.astype(jnp.float32) ** options.length_penalty
        worst = b.ended.score.min()  # -inf while a place is free
        done = (worst > -jnp.inf) & (options.early | (worst >= reach))
        return (b.step < options.max_new) & (b.total.max() > -jnp.inf) & ~done

    return lax.while_loop(goes_on, partial(_extend, cfg, params, options), beams).ended


def _extend(cfg: ModelConfig, params: Params, options: _Options, b: _Beams) -> _Beams:
    """One more token for every beam."""
    n = b.total.shape[0]
    hidden, cache = forward(cfg, params, b.last[:, None], cache=b.cache)
    assert cache is not None
    log_probs = jax.nn.log_softmax(unembed(cfg, params, hidden[:, 0]), axis=-1)
    vocab = log_probs.shape[-1]
    usable = ~jnp.isnan(log_probs) & (jnp.arange(vocab) < options.n_vocab)
    ranked = jnp.where(usable, b.total[:, None] + log_probs, -jnp.inf)

    # Even if the best extensions all stop, n others are among so many.
    total, flat = lax.top_k(ranked.reshape(-1), min(n * (1 + options.stop_ids.shape[0]), n * vocab))
    parent, token = flat // vocab, flat % vocab
    stops = (token[:, None] == options.stop_ids).any(-1)
    step = b.step + 1
    ends = stops | (step == options.max_new)
    tokens = b.tokens[parent].at[:, b.step].set(token)

    among_best = jnp.arange(total.shape[0]) < n
    score = jnp.where(ends & among_best, total / step.astype(jnp.float32) ** options.length_penalty, -jnp.inf)
    new = _Ended(score, total, tokens, jnp.full_like(token, step), stops)
    both = jax.tree.map(lambda held, more: jnp.concatenate([held, more]), b.ended, new)
    _, kept = lax.top_k(both.score, n)

    total, place = lax.top_k(jnp.where(ends, -jnp.inf, total), n)
    return _Beams(
        step=step,
        cache=_rows(cache, parent[place]),
        last=token[place],
        total=total,
        tokens=tokens[place],
        ended=jax.tree.map(lambda leaf: leaf[kept], both),
    )


def _rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row i is row rows[i]: whole rows, since with `key_offset` a key lies one place on."""
    return jax.tree.map(lambda leaf: leaf[rows] if leaf.size else leaf, cache)  # a bigram's keys are empty: [0, B, ...]
