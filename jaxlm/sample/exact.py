"""Sums of probabilities that come out the same in any order, and the threshold search built on them.

A float sum depends on the order of its terms, so on batch shape, blocking and device. Here a probability, relative to
the most likely token, becomes an integer number of quanta of 2**-40 in two limbs of 20 bits, and sums of those are
exact: one path through the vocabulary and another give the same bits, and so the same token. A sum is a `Digits`: three
int32 digits in base 2**20, most significant first. Cutting a term off loses less than 2**-40 of the largest
probability, so a whole vocabulary loses no more than one rounding of a float32 sum does.

Arrays over the vocabulary are blocked, [B, N, block] with N * block >= V: a block's limbs sum without overflow, and
blocks are what the draw searches first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BITS = 20
BLOCK = 512
MAX_VOCAB = 2**19  # 1024 blocks, so that sums of 20-bit digits over blocks stay below 2**30

_MASK = (1 << BITS) - 1
_INT_MIN, _INT_MAX = np.int32(-(2**31)), np.int32(2**31 - 1)
_NEGLIGIBLE = np.float32(28.0)
_LN2_HIGH = np.float32(0.693359375)  # 10 bits of ln 2, so that its product with a small integer is exact
_LN2_LOW = np.float32(math.log(2) - 0.693359375)


class Digits(NamedTuple):
    """A non-negative integer in base 2**20, int32 each; `units` counts whole multiples of the largest probability."""

    units: jax.Array
    high: jax.Array
    low: jax.Array


class Limbs(NamedTuple):
    """Numbers in [0, 1], as high * 2**-20 + low * 2**-40."""

    high: jax.Array
    low: jax.Array


def exp(d: jax.Array) -> jax.Array:
    """e**d for float32 d <= 0, within 2 units in the last place; 0 below -28, where e**d < 2**-40.

    XLA's own `exp` gives the same number other bits in a short array than in a long one, and a product that meets a sum
    is rounded once or twice, as the fusion around it has it. Here every operation is rounded by itself, so the bits
    depend on d alone. Source: e**d = 2**n e**r with n = round(d / ln 2), and the Taylor series of e**r, |r| <= 0.347.
    """
    small = jnp.maximum(d, -_NEGLIGIBLE)
    n = lax.round(small * np.float32(1 / np.log(2)), lax.RoundingMethod.TO_NEAREST_EVEN)
    r = small - n * _LN2_HIGH - _rounded(n * _LN2_LOW)  # n * _LN2_HIGH is exact
    series = jnp.full_like(r, 1 / math.factorial(7))
    for k in range(6, -1, -1):
        series = _rounded(series * r) + np.float32(1 / math.factorial(k))
    power = lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(d < -_NEGLIGIBLE, 0.0, series * power)


def _rounded(x: jax.Array) -> jax.Array:
    # An integer operation that changes nothing but the sign of zero: no compiler fuses the product before it with the
    # sum after it.
    return lax.bitcast_convert_type(jnp.maximum(lax.bitcast_convert_type(x, jnp.int32), _INT_MIN + 1), jnp.float32)


def limbs(x: jax.Array) -> Limbs:
    """float32 numbers in [0, 1] cut off to a multiple of 2**-40. Every step is exact."""
    scaled = x * np.float32(2.0**BITS)
    high = scaled.astype(jnp.int32)
    return Limbs(high, ((scaled - high.astype(jnp.float32)) * np.float32(2.0**BITS)).astype(jnp.int32))


def carry(units: jax.Array | int, high: jax.Array, low: jax.Array) -> Digits:
    """Digits from any int32 counts below 2**30 of each place."""
    high = high + (low >> BITS)
    return Digits(units + (high >> BITS), high & _MASK, low & _MASK)


def block_sums(x: Limbs) -> Digits:
    """[..., N, block] -> digits [..., N]."""
    high, low = reduce((x.high, x.low), (0, 0), lambda a, b: (a[0] + b[0], a[1] + b[1]))
    return carry(jnp.zeros_like(high), high, low)


def add_up(x: Digits) -> Digits:
    """Sums at most 1024 digits along the last axis."""
    return carry(*reduce(tuple(x), (0, 0, 0), lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] + b[2])))


def sums_where(mask: jax.Array, x: Limbs) -> Digits:
    """For every place, the sum of the limbs [B, W] that bool[B, place, W] selects; W at most 1024."""
    return block_sums(Limbs(*(jnp.where(mask, limb[:, None, :], 0) for limb in x)))


def running(x: Digits | Limbs) -> Digits:
    """Inclusive cumulative sums along the last axis: of at most 1024 digits, or of limbs within one block."""
    places = jnp.cumsum(jnp.stack(x), axis=-1)  # one scan over a stack compiles sooner than several
    return carry(places[0], places[1], places[2]) if isinstance(x, Digits) else carry(0, places[0], places[1])


def plus(a: Digits, b: Digits) -> Digits:
    """a + b, broadcast."""
    return carry(*(x + y for x, y in zip(a, b, strict=True)))


def above(a: Digits, b: Digits) -> jax.Array:
    """a > b, broadcast."""
    return (a.units > b.units) | ((a.units == b.units) & ((a.high > b.high) | ((a.high == b.high) & (a.low > b.low))))


def minus(a: Digits, b: Digits) -> jax.Array:
    """a - b, roughly, as float32 multiples of the largest probability. Digits are subtracted before rounding."""
    return _as_float(*(x - y for x, y in zip(a, b, strict=True)))


def ratio(a: Digits, b: Digits) -> jax.Array:
    """a / b as float32, 0 where b is 0. The same digits give the same bits."""
    divisor = _as_float(*b)
    # By a select and not by a broadcast, which XLA would turn into a product with the reciprocal at some shapes.
    return _as_float(*a) / jnp.where(divisor > 0, divisor, jnp.inf)


def _as_float(units: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    units, high, low = (x.astype(jnp.float32) for x in (units, high, low))
    return units + high * np.float32(2.0**-BITS) + low * np.float32(2.0 ** (-2 * BITS))  # the products are exact


def scaled(x: Digits, fraction: Sequence[jax.Array]) -> Digits:
    """floor(x * f), exactly, where f = sum of fraction[i] * 2**(-12 (i + 1)), every fraction[i] in 0 .. 2**12."""
    total = [x.low & 0xFFF, (x.low >> 12) | ((x.high & 0xF) << 8), (x.high >> 4) & 0xFFF]
    total += [(x.high >> 16) | ((x.units & 0xFF) << 4), x.units >> 8]  # base 2**12, least significant first
    factor = list(reversed(fraction))
    product = [jnp.zeros_like(x.low) for _ in range(len(total) + len(factor))]
    for i, a in enumerate(total):
        for j, b in enumerate(factor):
            product[i + j] = product[i + j] + a * b  # at most three terms of 2**24
    for i in range(len(product) - 1):
        product[i + 1] = product[i + 1] + (product[i] >> 12)
        product[i] = product[i] & 0xFFF
    d = product[len(factor) :]
    high = (d[1] >> 8) | (d[2] << 4) | ((d[3] & 0xF) << 16)
    return Digits((d[3] >> 4) | (d[4] << 8), high, d[0] | ((d[1] & 0xFF) << 12))


def sortable(x: jax.Array) -> jax.Array:
    """The monotone int32 image of float32: x < y as floats if and only if their images are so. 0 and -0 share one."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, np.float32(0.0), x), jnp.int32)
    return jnp.where(bits < 0, bits ^ _INT_MAX, bits)


def unsortable(key: jax.Array) -> jax.Array:
    """The float32 whose image is `key`."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ _INT_MAX, key), jnp.float32)


class _Search(NamedTuple):
    """Bracket of the threshold, one entry a row."""

    step: jax.Array  # int32[]
    low: jax.Array  # int32[B]; the threshold is at least this key
    high: jax.Array  # int32[B]; and at most this one
    below: jax.Array  # float32[B]; mass of keys < low, less the limit: <= 0
    upto: jax.Array  # float32[B]; mass of keys <= high, less the limit: > 0
    side: jax.Array  # int32[B]; +n / -n: the last n moves raised low / lowered high


def tail_threshold(
    key: jax.Array, weight: jax.Array, limit: Digits, low: jax.Array, high: jax.Array, total: Digits
) -> jax.Array:
    """The smallest key whose tail, all keys at most as large, weighs more than `limit`: int32[B].

    The bracket closes on keys that occur: each pass over the vocabulary weighs the keys up to a pivot, and finds the
    largest key up to it and the smallest above it, so that about as many passes are needed as a search among the
    sorted distinct keys would take, without sorting. Pivots only decide how soon it ends, never the result.

    Args:
        key: int32[B, N, block].
        weight: float32[B, N, block], in [0, 1].
        limit: [B].
        low: int32[B], a bound: the answer is not below it. Equal to `high` for rows that need no search.
        high: int32[B], a key that occurs and whose tail weighs more than `limit`.
        total: [B], weight of all keys up to `high`.
    """

    def narrow(s: _Search) -> _Search:
        pivot = jnp.clip(_pivot(s), s.low, s.high - 1)
        t = pivot[:, None, None]
        up = key <= t
        part = limbs(jnp.where(up, weight, 0.0))
        high_limb, low_limb, largest, smallest = reduce(
            (part.high, part.low, jnp.where(up, key, _INT_MIN), jnp.where(up, _INT_MAX, key)),
            (0, 0, _INT_MIN, _INT_MAX),
            lambda a, b: (a[0] + b[0], a[1] + b[1], jnp.maximum(a[2], b[2]), jnp.minimum(a[3], b[3])),
        )
        *places, largest, smallest = reduce(
            (*carry(0, high_limb, low_limb), largest, smallest),
            (0, 0, 0, _INT_MIN, _INT_MAX),
            lambda a, b: (
                a[0] + b[0], a[1] + b[1], a[2] + b[2], jnp.maximum(a[3], b[3]), jnp.minimum(a[4], b[4])
            ),
        )  # fmt: skip
        mass = carry(*places)
        heavy, rest = above(mass, limit), minus(mass, limit)
        live = s.low < s.high
        lower, raise_ = live & heavy, live & ~heavy
        return _Search(
            step=s.step + 1,
            low=jnp.where(raise_, smallest, s.low),
            high=jnp.where(lower, jnp.maximum(largest, s.low), s.high),
            below=jnp.where(raise_, rest, s.below),
            upto=jnp.where(lower, rest, s.upto),
            side=jnp.where(heavy, jnp.minimum(s.side, 0) - 1, jnp.maximum(s.side, 0) + 1),
        )

    none = jnp.zeros_like(low)
    zero = Digits(none, none, none)
    start = _Search(jnp.int32(0), low, high, minus(zero, limit), minus(total, limit), none)
    return lax.while_loop(lambda s: jnp.any(s.low < s.high), narrow, start).high


def _pivot(s: _Search) -> jax.Array:
    """Where to cut the bracket next: four halvings by value, then where the mass should cross the limit.

    Interpolation that keeps moving the same end yields to a halving, and after 24 passes halving the int32 bracket
    itself bounds the passes by 24 + 32.
    """
    x0, x1 = unsortable(s.low), unsortable(s.high)
    middle = x0 * 0.5 + x1 * 0.5
    cross = x0 + (x1 - x0) * (s.below / (s.below - s.upto))
    by_value = sortable(jnp.where((s.step < 4) | (jnp.abs(s.side) > 1), middle, cross))
    by_bits = (s.low & s.high) + ((s.low ^ s.high) >> 1)
    return jnp.where(s.step < 24, by_value, by_bits)


def reduce(arrays: tuple[jax.Array, ...], start: tuple[object, ...], combine: object) -> tuple[jax.Array, ...]:
    """Reduces the last axis of several arrays of one shape at once, by a function of two tuples."""
    # Variadic, because XLA's CPU backend makes one vectorised pass of it, and slow scalar loops of single reductions.
    typed = tuple(np.asarray(s, a.dtype) for s, a in zip(start, arrays, strict=True))  # for jax_enable_x64
    return tuple(lax.reduce(arrays, typed, combine, (arrays[0].ndim - 1,)))  # type: ignore[arg-type]
