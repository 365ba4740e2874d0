"""The compiled loop of beam search: every step extends each beam by every token, and ranks; see `jaxlm.sample.beam`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlm.config import ModelConfig
from jaxlm.model import Cache, Params, forward, unembed
from jaxlm.model.cache import map_rows
from jaxlm.sample import decode as decoding
from jaxlm.sample import requests as asking


class Ended(NamedTuple):
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


class Beams(NamedTuple):
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
    ended: Ended


class Search(NamedTuple):
    """A search under way.

    Attributes:
        step: int32[], tokens that every beam has.
        cache: of the P * n beams.
        beams: where they stand.
    """

    step: jax.Array
    cache: Cache
    beams: Beams


class Options(NamedTuple):
    """What was asked for, as data: no value of it compiles anything."""

    max_new: jax.Array  # int32[]
    length_penalty: jax.Array  # float32[]
    early: jax.Array  # bool[]
    stop_ids: jax.Array  # int32[E], -1 is padding
    n_vocab: jax.Array  # int32[]


@partial(jax.jit, static_argnames=("n", "room"))
def begin(cfg: ModelConfig, params: Params, prompt: jax.Array, *, n: int, room: int) -> Search:
    """A search with the prompts, int32[P, T] padded with -1, in its cache, and room for so many new tokens."""
    batch = prompt.shape[0]
    capacity = asking.capacity(cfg, prompt.shape[1], room)
    start = decoding.prefill(cfg, params, prompt, capacity=capacity, n_new=room)
    none = jnp.full((batch, n), -jnp.inf, jnp.float32)
    tokens = jnp.full((batch, n, room), -1, jnp.int32)
    in_use = start.finished == decoding.RUNNING
    beams = Beams(
        last=jnp.repeat(start.last[:, None], n, axis=1),
        total=none.at[:, 0].set(jnp.where(in_use, 0.0, -jnp.inf)),  # all beams are the same: only one may be extended
        tokens=tokens,
        ended=Ended(none, none, tokens, jnp.zeros((batch, n), jnp.int32), jnp.zeros((batch, n), bool)),
    )
    return Search(jnp.int32(0), _rows(start.cache, jnp.repeat(jnp.arange(batch), n)), beams)


@partial(jax.jit, donate_argnames="search")
def go_on(
    cfg: ModelConfig, params: Params, options: Options, search: Search, until: jax.Array | int
) -> tuple[Search, jax.Array]:
    """The search up to `until` tokens, and bool[]: whether any prompt goes on."""
    batch, n = search.beams.last.shape

    def runs(step: jax.Array, b: Beams) -> jax.Array:
        """bool[P]: which prompts go on."""
        # Totals only fall, so a beam scores at most its total over the length that serves it best.
        length = jnp.where(options.length_penalty > 0, options.max_new, step + 1)
        reach = b.total.max(-1) / length.astype(jnp.float32) ** options.length_penalty
        worst = b.ended.score.min(-1)  # -inf while a place is free
        done = (worst > -jnp.inf) & (options.early | (worst >= reach))
        return (step < options.max_new) & (b.total.max(-1) > -jnp.inf) & ~done

    def body(search: Search) -> Search:
        step, cache, b = search
        hidden, grown = forward(cfg, params, b.last.reshape(-1, 1), cache=cache)
        assert grown is not None
        log_probs = jax.nn.log_softmax(unembed(cfg, params, hidden[:, 0]), axis=-1).reshape(batch, n, -1)
        parent, extended = jax.vmap(partial(_extend, options, step + 1))(b, log_probs)
        active = runs(step, b)
        b = jax.tree.map(lambda new, old: _where(active, new, old), extended, b)
        return Search(step + 1, _rows(grown, (jnp.arange(batch)[:, None] * n + parent).reshape(-1)), b)

    def goes_on(search: Search) -> jax.Array:
        return runs(search.step, search.beams).any()

    search = lax.while_loop(lambda search: (search.step < until) & goes_on(search), body, search)
    return search, goes_on(search)


def _extend(options: Options, step: jax.Array, b: Beams, log_probs: jax.Array) -> tuple[jax.Array, Beams]:
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
    new = Ended(score, total, tokens, jnp.full_like(token, step), stops)
    both = jax.tree.map(lambda held, more: jnp.concatenate([held, more]), b.ended, new)
    _, kept = lax.top_k(both.score, n)

    total, place = lax.top_k(jnp.where(ends, -jnp.inf, total), n)
    ended = jax.tree.map(lambda leaf: leaf[kept], both)
    return parent[place], Beams(token[place], total, tokens[place], ended)


def _where(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def _rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row i is row rows[i]: whole rows, since with `key_offset` a key lies one place on."""
    return map_rows(lambda leaf: leaf[rows] if leaf.size else leaf, cache)  # a bigram's keys are empty: [0, B, ...]
