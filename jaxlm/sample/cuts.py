"""Where the filters cut: exact thresholds for each row, found in one of two ways that give the same bits.

`search` weighs the whole vocabulary against pivots (see `jaxlm.sample.exact`); `look` sorts the few most likely tokens
where all rows' top-k is small. The rules are those of `jaxlm.sample.filters`.

Typical needs no logarithm. With d = y - max(y), a token's information less the entropy is -log p - H = E[d] - d: what
log-sum-exp adds to the one it adds to the other. So the tokens kept are those whose logit is nearest to the mean logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxlm.errors import InputError
from jaxlm.sample import arguments, exact

_WINDOW = 64
_WINDOW_FROM = 8192  # below this vocabulary the search is fast enough to do without a second path
_LARGEST_WINDOW = 1024  # places that `exact.sums_where` may add up
_GROUP = 16  # members of a group in `most_likely`: measured at 4 to 48, for vocabularies of 50,257 and 151,936
_GROUPED_FROM = 32768  # below this, one `top_k` is as fast

_KEEP_ALL = np.int32(-(2**31))
_REACH_ALL = np.int32(2**31 - 1)
_MINUS_INF = np.int32(-0x7F800001)  # the sortable image of -inf
_NEGLIGIBLE = np.float32(28.0)  # exp(-28) < 2**-40


class Options(NamedTuple):
    """Filter options, one entry a row."""

    temperature: ArrayLike  # float32[B]
    top_k: ArrayLike  # int32[B]
    top_p: ArrayLike  # float32[B]
    min_p: ArrayLike  # float32[B]
    typical_p: ArrayLike  # float32[B]


_TYPES = (np.float32, np.int32, np.float32, np.float32, np.float32)


class Rows(NamedTuple):
    """Logits as rows, with their options and what the filters need to know of each row."""

    x: jax.Array  # float32[B, V], before temperature
    divisor: jax.Array  # float32[B], the temperature; 1 for greedy rows
    largest: (
        jax.Array
    )  # float32[B], after temperature; NaN: the row has a NaN or a bad option; -inf: it has nothing but -inf
    greedy: jax.Array  # bool[B]; only the first largest logit survives
    top_k: jax.Array  # int32[B]
    top_p: jax.Array  # float32[B], in 0 .. 1
    min_p: jax.Array  # float32[B], in 0 .. 1
    typical_p: jax.Array  # float32[B], in 0 .. 1


class Cut(NamedTuple):
    """What a row keeps beside min-p: logits from a threshold on, and not too far from the mean."""

    lowest: jax.Array  # int32[B], the smallest sortable key that top-k and top-p keep
    mean: jax.Array  # float32[B], the expected logit, less the largest
    reach: jax.Array  # int32[B], the bits of the largest distance from `mean` that typical keeps


class Window(NamedTuple):
    """The W most likely tokens of each row, most likely first."""

    y: jax.Array  # float32[B, W], logits after temperature
    prob: jax.Array  # float32[B, W], relative to the most likely
    token: jax.Array  # int32[B, W]
    cut: Cut
    suffices: jax.Array  # bool[B]; every token that the row keeps is in the window


def per_row(logits: jax.Array, *options: ArrayLike) -> Options:
    """One entry a row of each option, so that scalars, arrays and defaults all run the same compiled program."""
    vocab = logits.shape[-1] if logits.ndim else 0
    if not 0 < vocab <= exact.MAX_VOCAB:
        raise InputError(f"logits of shape {logits.shape}: the last axis must hold 1 to {exact.MAX_VOCAB} tokens.")

    def spread(name: str, option: ArrayLike, dtype: type) -> ArrayLike:
        numpy: Any = jnp if isinstance(option, jax.Array) else np
        try:
            return numpy.broadcast_to(numpy.asarray(option, dtype), logits.shape[:-1]).reshape(-1)
        except (TypeError, ValueError, OverflowError) as error:
            found = f"shape {option.shape}" if hasattr(option, "shape") else f"{option!r:.60}"
            rows = f" or {logits.shape[:-1]} of them" if logits.ndim > 1 else ""
            room = f" that {np.dtype(dtype)} can hold" if isinstance(error, OverflowError) else ""
            raise InputError(f"{name}: must be a number{rows}{room}, found {found}.") from None

    return Options(*(spread(*item) for item in zip(Options._fields, options, _TYPES, strict=True)))


def as_rows(logits: jax.Array, option: Options, u: tuple[jax.Array, ...] = ()) -> Rows:
    """Flattens [..., V] to rows and applies the temperature. `u`, int32[B], is what the rows are to be joined with."""
    x = logits.astype(jnp.float32).reshape(-1, logits.shape[-1])
    given = [jnp.asarray(o) for o in option]
    # Inside jax.shard_map, branches must agree in whether they differ between shards: all rows are made to differ if
    # anything of them does. Outside, the compiler takes these choices away.
    x = varying(x, x[:, 0], *given, *u)
    t, top_k, *shares = (varying(o, x[:, 0]) for o in given)
    # NaN is looked for by name: at some shapes XLA's CPU backend lets it get lost in a maximum.
    entries = lax.stop_gradient(x)  # what is kept is a choice: gradients reach kept logits only
    largest, has_nan = exact.reduce(
        (entries, jnp.isnan(x).astype(jnp.int32)), (-jnp.inf, 0), lambda a, b: (jnp.maximum(a[0], b[0]), a[1] | b[1])
    )
    overflows = jnp.isfinite(largest) & ~jnp.isfinite(largest / t)
    greedy = (t == 0) | overflows
    divisor = jnp.where(greedy, 1.0, t)
    bad = (has_nan > 0) | ~jnp.isfinite(t) | (t < 0)
    for share in shares:
        bad |= jnp.isnan(share)
    largest = jnp.where(bad, jnp.nan, largest / divisor)
    return Rows(x, divisor, largest, greedy, top_k, *(jnp.clip(share, 0.0, 1.0) for share in shares))


def varying(value: jax.Array, *like: jax.Array) -> jax.Array:
    """`value`, [B, ...], as an array that may differ between shards where any of the others, [B], does."""
    for other in like:
        value = jnp.where((other != other).reshape(-1, *(1,) * (value.ndim - 1)), value, value)
    return value


def warmed(rows: Rows, x: jax.Array) -> jax.Array:
    """Logits x [B, ...] of the rows after temperature."""
    # XLA turns a division by a broadcast into a product with the reciprocal, at some shapes only; not by a select.
    return x / jnp.where(jnp.isnan(x), 1.0, _wide(rows.divisor, x))


def usable(rows: Rows) -> jax.Array:
    """bool[B]: the row has a distribution."""
    return ~jnp.isnan(rows.largest) & (rows.largest > -jnp.inf)


def relative(y: jax.Array, largest: jax.Array) -> jax.Array:
    """Probabilities over that of the most likely token; y is [B, ...]."""
    return exact.exp(_below(y, largest))


def first_largest(rows: Rows) -> jax.Array:
    """int32[B]: of greedy rows the first token with the largest logit, anything of others.

    Two vectorised passes, for `argmax` is a slow loop on CPU; none where no row is greedy.
    """
    batch, vocab = rows.x.shape

    def find() -> jax.Array:
        places = jnp.where(rows.x == rows.largest[:, None], jnp.arange(vocab, dtype=jnp.int32), vocab)
        return jnp.minimum(places.min(-1), vocab - 1)

    return lax.cond(rows.greedy.any(), find, lambda: varying(jnp.zeros(batch, jnp.int32), rows.largest))


def keeps(rows: Rows, y: jax.Array, prob: jax.Array, cut: Cut) -> jax.Array:
    """What the filters keep of logits y [B, ...] with relative probabilities `prob`, bool of the same shape."""
    high_enough = (exact.sortable(y) >= _wide(cut.lowest, y)) & (prob >= _wide(rows.min_p, y))
    return high_enough & (_away(rows, y, cut.mean) <= _wide(cut.reach, y))


def blocked(y: jax.Array) -> jax.Array:
    """[B, V] -> [B, N, block], padded with -inf."""
    block = min(exact.BLOCK, y.shape[1])
    padded = jnp.pad(y, ((0, 0), (0, -y.shape[1] % block)), constant_values=-jnp.inf)
    return padded.reshape(y.shape[0], padded.shape[1] // block, block)  # said, for B may be 0


def search(rows: Rows, y: jax.Array, prob: jax.Array) -> Cut:
    """Where the rows are cut, by search over the whole vocabulary.

    Args:
        rows: the logits and options.
        y: `blocked(warmed(rows, rows.x))`.
        prob: float32, of y's shape: its relative probabilities.
    """
    key, most = exact.sortable(y), exact.sortable(rows.largest)
    size, none = y.shape[1] * y.shape[2], varying(jnp.zeros_like(most), rows.largest)
    live = usable(rows) & ~rows.greedy
    by_k = live & (rows.top_k > 0) & (rows.top_k < rows.x.shape[1])
    by_p, by_typical = live & (rows.top_p < 1), live & (rows.typical_p < 1)
    # Top-k is a tail rule too: every token weighs one quantum, and at most V - k are no more likely than a dropped one.
    count = exact.Digits(none, none, size - rows.top_k)

    def stage(i: jax.Array, lowest: jax.Array) -> jax.Array:
        at_k = i == 0
        left = jnp.where(key >= _wide(lowest, y), prob, 0.0)
        weight = jnp.where(at_k, np.float32(2.0**-40), left)
        total = exact.add_up(exact.block_sums(exact.limbs(weight)))
        share = exact.scaled(total, _rest(rows.top_p))
        limit = exact.Digits(*(jnp.where(at_k, k, p) for k, p in zip(count, share, strict=True)))
        low = jnp.where(at_k, _MINUS_INF, exact.sortable(rows.largest - _NEGLIGIBLE))
        wanted = jnp.where(at_k, by_k, by_p)
        found = exact.tail_threshold(key, weight, limit, jnp.where(wanted, low, most), most, total)
        return jnp.where(wanted, jnp.maximum(found, lowest), lowest)

    def typical() -> tuple[jax.Array, jax.Array]:
        weight = jnp.where((key >= _wide(lowest, y)) & (prob >= _wide(rows.min_p, y)), prob, 0.0)
        total = exact.add_up(exact.block_sums(exact.limbs(weight)))
        mean = -exact.ratio(exact.add_up(exact.block_sums(exact.limbs(_moment(rows, y, weight)))), total)
        away = _away(rows, y, mean)
        farthest = jnp.where(weight > 0, away, 0).max((1, 2))
        limit = _less_than(total, exact.scaled(total, _rest(rows.typical_p)))
        low = jnp.where(by_typical, 0, farthest)
        found = exact.tail_threshold(away, weight, limit, low, farthest, total)
        return mean, jnp.where(by_typical, found, _REACH_ALL)

    # A loop over both stages, so that the search is compiled once; one that no row wants is left out.
    first, end = jnp.where(by_k.any(), 0, 1), jnp.where(by_p.any(), 2, 1)
    lowest = lax.fori_loop(first, end, stage, none + _KEEP_ALL)
    off = varying(jnp.zeros_like(rows.top_p), rows.largest), none + _REACH_ALL
    return Cut(lowest, *lax.cond(by_typical.any(), typical, lambda: off))


def width(vocab: int, window: int | None) -> int:
    """W, tokens in the window; 0: there is none.

    Raises:
        InputError: `window` is no integer of at least 0.
    """
    if window is None:
        window = _WINDOW if vocab >= _WINDOW_FROM else 0
    return min(arguments.check_count("window", window, 0), _LARGEST_WINDOW, vocab)


def most_likely(x: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The `width` largest of each row [B, V] and their places, largest first: [B, W] each.

    `lax.top_k` takes a scalar step for every entry, a maximum a vectorised one for many: so first the maxima of groups,
    then `top_k` of those, then of the members of the groups found. A value in a group that was not found has W values
    at least as large before it, so the values are those of `top_k` over all, whatever the ties; which of the tokens
    tied with the last is taken may differ.
    """
    batch, vocab = x.shape
    groups = -(-vocab // _GROUP)
    if vocab < _GROUPED_FROM or groups < width or batch * vocab >= 2**31:  # places in all rows are int32
        largest, place = lax.top_k(x, width)
        return largest, place
    # Group g has the entries g, g + groups, ...: their maximum runs along whole vectors.
    grid = jnp.pad(x, ((0, 0), (0, groups * _GROUP - vocab)), constant_values=-jnp.inf)
    _, group = lax.top_k(grid.reshape(batch, _GROUP, groups).max(1), width)
    place = (jnp.arange(_GROUP)[:, None] * groups + group[:, None, :]).reshape(batch, -1)
    flat = jnp.arange(batch)[:, None] * vocab + jnp.minimum(place, vocab - 1)
    found = x.reshape(-1).at[flat].get(mode="promise_in_bounds")
    found = jnp.where(place < vocab, found, -jnp.inf)
    largest, chosen = lax.top_k(found, width)
    return largest, jnp.take_along_axis(jnp.minimum(place, vocab - 1), chosen, axis=1)


def look(rows: Rows, width: int) -> Window:
    """The window, or one that suffices for no row where some row's top-k is not below `width`."""
    batch, vocab = rows.x.shape
    zeros, nobody = (varying(jnp.zeros(batch, t), rows.largest) for t in (jnp.int32, bool))
    if not width:
        empty = varying(jnp.zeros((batch, 0), jnp.float32), rows.largest)
        return Window(
            empty, empty, empty.astype(jnp.int32), Cut(zeros, zeros.astype(jnp.float32), zeros), nobody
        )  # fmt: skip
    exempt = ~usable(rows) | rows.greedy | (width == vocab)
    may_do = exempt | ((rows.top_k > 0) & (rows.top_k < width))

    def top() -> tuple[jax.Array, ...]:
        return most_likely(rows.x, width)  # division by a temperature keeps the order, and may only add ties

    def nothing() -> tuple[jax.Array, ...]:
        return tuple(varying(jnp.zeros((batch, width), t), rows.largest) for t in (jnp.float32, jnp.int32))

    x, token = lax.cond(may_do.all(), top, nothing)
    y = warmed(rows, x)
    key, prob = exact.sortable(y), relative(y, rows.largest)
    at_k = jnp.take_along_axis(key, jnp.clip(rows.top_k - 1, 0, width - 1)[:, None], axis=1)[:, 0]
    lowest = jnp.where((rows.top_k > 0) & (rows.top_k <= width), at_k, _KEEP_ALL)
    suffices = may_do.all() & (exempt | (lowest > key[:, -1]))  # else a tie may reach beyond the window

    weight, total = _weighed(jnp.where(key >= lowest[:, None], prob, 0.0))
    limit = exact.scaled(total, tuple(share[:, None] for share in _rest(rows.top_p)))
    more_likely = exact.sums_where(key[:, None, :] > key[:, :, None], weight)
    heavy = exact.above(total, exact.plus(more_likely, limit)) | (key == key[:, :1])
    at_p = jnp.where(heavy & (key >= lowest[:, None]), key, key[:, :1]).min(-1)
    lowest = jnp.where(rows.top_p < 1, at_p, lowest)

    def typical() -> tuple[jax.Array, jax.Array]:
        kept = jnp.where((key >= lowest[:, None]) & (prob >= rows.min_p[:, None]), prob, 0.0)
        weight, total = _weighed(kept)
        mean = -exact.ratio(_weighed(_moment(rows, y, kept))[1], total)[:, 0]
        away = _away(rows, y, mean)
        limit = _less_than(total, exact.scaled(total, tuple(share[:, None] for share in _rest(rows.typical_p))))
        heavy = exact.above(exact.sums_where(away[:, None, :] <= away[:, :, None], weight), limit)
        return mean, jnp.where(rows.typical_p < 1, jnp.where(heavy, away, _REACH_ALL).min(-1), _REACH_ALL)

    off = varying(jnp.zeros_like(rows.typical_p), rows.largest), zeros + _REACH_ALL
    return Window(y, prob, token, Cut(lowest, *lax.cond((rows.typical_p < 1).any(), typical, lambda: off)), suffices)


def _wide(x: jax.Array, y: jax.Array) -> jax.Array:
    return x.reshape(x.shape + (1,) * (y.ndim - 1))


def _below(y: jax.Array, largest: jax.Array) -> jax.Array:
    most = _wide(largest, y)
    return jnp.where(y == most, 0.0, y - most)  # the first case also covers +inf


def _away(rows: Rows, y: jax.Array, mean: jax.Array) -> jax.Array:
    """Distance of the logits from their mean, as its bits: non-negative floats have the order of their bits."""
    distance = jnp.abs(_below(y, rows.largest) - _wide(mean, y))
    return lax.bitcast_convert_type(distance, jnp.int32)


def _moment(rows: Rows, y: jax.Array, prob: jax.Array) -> jax.Array:
    """The terms of the mean, turned positive; at most 1 / e."""
    return jnp.where(prob > 0, -_below(y, rows.largest) * prob, 0.0)


def _weighed(x: jax.Array) -> tuple[exact.Limbs, exact.Digits]:
    """Limbs [B, W] of a window, and their sum, [B, 1]."""
    weight = exact.limbs(x)
    return weight, exact.block_sums(exact.Limbs(*(limb[:, None] for limb in weight)))


def _rest(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 - p in base 2**12."""
    share = ((1.0 - p) * np.float32(2.0**24)).astype(jnp.int32)  # exact: 1 - p is a multiple of 2**-24
    return share >> 12, share & 0xFFF


def _less_than(total: exact.Digits, rest: exact.Digits) -> exact.Digits:
    """One quantum less than total - rest, so that to be above it is to reach total - rest; not below 0."""
    digits = exact.carry(total.units - rest.units, total.high - rest.high, total.low - rest.low - 1)
    return exact.Digits(*(jnp.where(digits.units < 0, 0, digit) for digit in digits))
