"""Logit filters: temperature, top-k, top-p and min-p, each row with its own options, without sorting the vocabulary.

What is kept, in this order:

- temperature: logits are divided by it. 0 keeps the first largest logit alone, undivided.
- top-k: tokens with fewer than k tokens strictly more likely. `k <= 0` and `k >= V` keep all.
- top-p: with the probabilities of what is left renormalised, a token is dropped while the total probability of all
  tokens no more likely than it is at most 1 - p; the most likely is always kept. `p >= 1` keeps all, `p <= 0` only the
  most likely.
- min-p: tokens at least `min_p` times as likely as the most likely. `min_p <= 0` keeps all, `min_p >= 1` only those.

Tokens with equal logits are kept or dropped together, so nothing depends on the order of the vocabulary. Probabilities
are summed as integers (see `jaxlm.sample.exact`), so a row gets the same bits alone, in any batch, under `vmap`, and on
either of two paths: a search for the thresholds over the whole vocabulary, or `lax.top_k` where every row's k is small.
A token less likely than 2**-40 times the most likely counts as probability zero.

Rows without a distribution: one with a NaN logit, or with an option that is NaN, or a temperature that is negative or
infinite, becomes all NaN; a row of nothing but `-inf` stays so. Logits of `+inf` share all probability equally. A
temperature so small that the largest logit overflows is 0. Neighbours never notice any of it.

transformers applies the same order, breaking ties at p by sort order. llama.cpp, mlx-lm and MaxText apply temperature
last, so their top-p sets differ from these when the temperature is not 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxlm.errors import InputError
from jaxlm.sample import exact

_WINDOW = 64
_WINDOW_FROM = 8192  # below this vocabulary the search is fast enough to do without a second path

_KEEP_ALL = np.int32(-(2**31))
_MINUS_INF = np.int32(-0x7F800001)  # the sortable image of -inf
_NEGLIGIBLE = np.float32(28.0)  # exp(-28) < 2**-40


class Options(NamedTuple):
    """Filter options, one entry a row."""

    temperature: ArrayLike  # float32[B]
    top_k: ArrayLike  # int32[B]
    top_p: ArrayLike  # float32[B]
    min_p: ArrayLike  # float32[B]


_TYPES = (np.float32, np.int32, np.float32, np.float32)


class Rows(NamedTuple):
    """Logits as rows, with their options and what the filters need to know of each row."""

    y: jax.Array  # float32[B, V], after temperature
    largest: jax.Array  # float32[B]; NaN: the row has a NaN or a bad option; -inf: it has nothing but -inf
    greedy: jax.Array  # bool[B]; only the first largest logit survives
    top_k: jax.Array  # int32[B]
    top_p: jax.Array  # float32[B], in 0 .. 1
    min_p: jax.Array  # float32[B], in 0 .. 1


class Window(NamedTuple):
    """The W most likely tokens of each row, most likely first."""

    key: jax.Array  # int32[B, W], sortable images of the logits after temperature
    prob: jax.Array  # float32[B, W], relative to the most likely
    token: jax.Array  # int32[B, W]
    threshold: jax.Array  # int32[B], the smallest key that top-k and top-p keep
    suffices: jax.Array  # bool[B]; every token that the row keeps is in the window


def filter_logits(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    window: int | None = None,
) -> jax.Array:
    """Logits after temperature, with dropped tokens at -inf. The rules are at the top of this module.

    Args:
        logits: [..., V], any float type; work is in float32.
        temperature: scalar or [...].
        top_k: scalar or [...], integers.
        top_p: scalar or [...].
        min_p: scalar or [...].
        window: batches whose rows all have a top-k below this look only at `lax.top_k` of so many tokens; 0 turns that
            off, and by default it is 64 from a vocabulary of 8192. It changes no bit of the result.

    Returns:
        float32[..., V].

    Raises:
        InputError: a vocabulary outside 1 .. 524,288.

    References:
        Fan et al. (arXiv 1805.04833) for top-k; Holtzman et al. (arXiv 1904.09751) for top-p; Nguyen et al.
        (arXiv 2407.01082) for min-p.
    """
    logits = jnp.asarray(logits)
    return _filter(logits, per_row(logits, temperature, top_k, top_p, min_p), window)


@partial(jax.jit, static_argnums=2)
def _filter(logits: jax.Array, option: Options, window: int | None) -> jax.Array:
    rows = as_rows(logits, option)
    found = look(rows, window)

    def by_search() -> jax.Array:
        y = blocked(rows.y)
        return search(rows, y, relative(y, rows.largest))

    threshold = lax.cond(found.suffices.all(), lambda: found.threshold, by_search)
    kept = keeps(rows, exact.sortable(rows.y), relative(rows.y, rows.largest), threshold)
    first = jnp.arange(rows.y.shape[1]) == first_largest(rows)[:, None]
    y = jnp.where(jnp.where(rows.greedy[:, None], first, kept), rows.y, -jnp.inf)
    return jnp.where(jnp.isnan(rows.largest)[:, None], jnp.nan, y).reshape(logits.shape)


def per_row(logits: jax.Array, temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike, min_p: ArrayLike) -> Options:
    """One entry a row of each option, so that scalars, arrays and defaults all run the same compiled program."""
    vocab = logits.shape[-1] if logits.ndim else 0
    if not 0 < vocab <= exact.MAX_VOCAB:
        raise InputError(f"logits of shape {logits.shape}: the last axis must hold 1 to {exact.MAX_VOCAB} tokens.")

    def spread(option: ArrayLike, dtype: type) -> ArrayLike:
        numpy: Any = jnp if isinstance(option, jax.Array) else np
        return numpy.broadcast_to(numpy.asarray(option, dtype), logits.shape[:-1]).reshape(-1)

    return Options(*(spread(o, t) for o, t in zip((temperature, top_k, top_p, min_p), _TYPES, strict=True)))


def as_rows(logits: jax.Array, option: Options) -> Rows:
    """Flattens [..., V] to rows and applies the temperature."""
    x = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
    t, top_k, p, floor = (jnp.asarray(o) for o in option)
    largest = x.max(-1)
    overflows = jnp.isfinite(largest) & ~jnp.isfinite(largest / t)
    greedy = (t == 0) | overflows
    divisor = jnp.where(greedy, 1.0, t)
    # NaN is looked for by name: at some shapes XLA's CPU backend lets it get lost in a maximum.
    bad = jnp.isnan(x).any(-1) | ~jnp.isfinite(t) | (t < 0) | jnp.isnan(p) | jnp.isnan(floor)
    largest = jnp.where(bad, jnp.nan, largest / divisor)
    # XLA turns a division by a broadcast into a product with the reciprocal, at some shapes only; not by a select.
    y = x / jnp.where(jnp.isnan(x), 1.0, divisor[:, None])
    return Rows(y, largest, greedy, top_k, jnp.clip(p, 0.0, 1.0), jnp.clip(floor, 0.0, 1.0))


def usable(rows: Rows) -> jax.Array:
    """bool[B]: the row has a distribution."""
    return ~jnp.isnan(rows.largest) & (rows.largest > -jnp.inf)


def relative(y: jax.Array, largest: jax.Array) -> jax.Array:
    """Probabilities over that of the most likely token; y is [B, ...]."""
    most = largest.reshape(largest.shape + (1,) * (y.ndim - 1))
    return exact.exp(jnp.where(y == most, 0.0, y - most))  # the first case also covers +inf


def first_largest(rows: Rows) -> jax.Array:
    """int32[B]: the first token with the largest logit (two vectorised passes; `argmax` is a slow loop on CPU)."""
    vocab = rows.y.shape[1]
    places = jnp.where(rows.y == rows.largest[:, None], jnp.arange(vocab, dtype=jnp.int32), vocab)
    return jnp.minimum(places.min(-1), vocab - 1)


def keeps(rows: Rows, key: jax.Array, prob: jax.Array, threshold: jax.Array) -> jax.Array:
    """What the filters keep, bool of key's shape [B, ...], given the smallest key that top-k and top-p keep."""
    wide = (-1,) + (1,) * (key.ndim - 1)
    return (key >= threshold.reshape(wide)) & (prob >= rows.min_p.reshape(wide))


def blocked(y: jax.Array) -> jax.Array:
    """[B, V] -> [B, N, block], padded with -inf."""
    block = min(exact.BLOCK, y.shape[1])
    return jnp.pad(y, ((0, 0), (0, -y.shape[1] % block)), constant_values=-jnp.inf).reshape(y.shape[0], -1, block)


def search(rows: Rows, y: jax.Array, prob: jax.Array) -> jax.Array:
    """The smallest sortable key that top-k and top-p keep, int32[B], by search over the whole vocabulary.

    Args:
        rows: the logits and options.
        y: `blocked(rows.y)`.
        prob: float32, of y's shape: its relative probabilities.
    """
    key, most = exact.sortable(y), exact.sortable(rows.largest)
    size, none = y.shape[1] * y.shape[2], jnp.zeros_like(most)
    by_k = usable(rows) & (rows.top_k > 0) & (rows.top_k < rows.y.shape[1])
    by_p = usable(rows) & (rows.top_p < 1)
    # Top-k is a tail rule too: every token weighs one quantum, and at most V - k are no more likely than a dropped one.
    count = exact.Digits(none, none, size - rows.top_k)

    def stage(i: jax.Array, threshold: jax.Array) -> jax.Array:
        at_k = i == 0
        left = jnp.where(key >= threshold[:, None, None], prob, 0.0)
        weight = jnp.where(at_k, np.float32(2.0**-40), left)
        total = exact.add_up(exact.block_sums(exact.limbs(weight)))
        share = exact.scaled(total, _tail_share(rows.top_p))
        limit = exact.Digits(*(jnp.where(at_k, k, p) for k, p in zip(count, share, strict=True)))
        low = jnp.where(at_k, _MINUS_INF, exact.sortable(rows.largest - _NEGLIGIBLE))
        wanted = jnp.where(at_k, by_k, by_p)
        found = exact.tail_threshold(key, weight, limit, jnp.where(wanted, low, most), most, total)
        return jnp.where(wanted, jnp.maximum(found, threshold), threshold)

    # A loop over both stages, so that the search is compiled once; one that no row wants is left out.
    first, end = jnp.where(by_k.any(), 0, 1), jnp.where(by_p.any(), 2, 1)
    return lax.fori_loop(first, end, stage, none + _KEEP_ALL)


def _tail_share(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    share = ((1.0 - p) * np.float32(2.0**24)).astype(jnp.int32)  # exact: 1 - p is a multiple of 2**-24
    return share >> 12, share & 0xFFF


def look(rows: Rows, width: int | None) -> Window:
    """The window, or one that suffices for no row where some row's top-k is not below `width`."""
    batch, vocab = rows.y.shape
    if width is None:
        width = _WINDOW if vocab >= _WINDOW_FROM else 0
    width = min(width, vocab)
    if not width:
        empty = jnp.zeros((batch, 0))
        return Window(
            empty.astype(jnp.int32), empty, empty.astype(jnp.int32), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
        )
    exempt = ~usable(rows) | rows.greedy | (width == vocab)
    may_do = exempt | ((rows.top_k > 0) & (rows.top_k < width))

    def top() -> tuple[jax.Array, ...]:
        return tuple(lax.top_k(rows.y, width))

    def nothing() -> tuple[jax.Array, ...]:
        return jnp.zeros((batch, width), jnp.float32), jnp.zeros((batch, width), jnp.int32)

    y, token = lax.cond(may_do.all(), top, nothing)
    key, prob = exact.sortable(y), relative(y, rows.largest)
    at_k = jnp.take_along_axis(key, jnp.clip(rows.top_k - 1, 0, width - 1)[:, None], axis=1)[:, 0]
    threshold = jnp.where((rows.top_k > 0) & (rows.top_k <= width), at_k, _KEEP_ALL)
    suffices = may_do.all() & (exempt | (threshold > key[:, -1]))  # else a tie may reach beyond the window

    weight = exact.limbs(jnp.where(key >= threshold[:, None], prob, 0.0))
    total = exact.block_sums(exact.Limbs(*(limb[:, None] for limb in weight)))
    limit = exact.scaled(total, tuple(share[:, None] for share in _tail_share(rows.top_p)))
    more_likely = exact.sums_where(key[:, None, :] > key[:, :, None], weight)
    heavy = exact.above(total, exact.plus(more_likely, limit)) | (key == key[:, :1])
    at_p = jnp.where(heavy & (key >= threshold[:, None]), key, key[:, :1]).min(-1)
    return Window(key, prob, token, jnp.where(rows.top_p < 1, at_p, threshold), suffices)
