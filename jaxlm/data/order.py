"""Which rows each training step reads: a pure function of (seed, step, number of rows). Plain integers, no state.

Every epoch visits all rows once in a new order, and the epochs follow one another without a gap, so training reads
one endless sequence of row numbers and a batch is a slice of it: it may straddle two epochs, a resume needs only the
number of rows consumed, and neither the batch size nor the number of hosts changes the sequence.

The order of an epoch is a keyed permutation computed row by row, so nothing of the size of the dataset is stored or
shuffled: a generalised Feistel network on pairs (x, y) of Z_a x Z_b with a * b just above the number of rows, and cycle
walking for the few values beyond it. (J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002,
sections 3 and 4.) Its round function is the output function of splitmix64 (G. Steele, D. Lea, C. Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 17). Both are fixed here, because numpy's generators
promise no stable stream across versions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from jaxlm.errors import InputError

ROUNDS = 8  # four are enough against attack with a strong round function; small row counts mix better with more

_WORD = 1 << 64
_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's odd constant: 2**64 over the golden ratio
_ROUND_OFFSETS = np.array([[i * _GAMMA % _WORD] for i in range(ROUNDS)], dtype=np.uint64)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_HALVE = np.uint64(1)
_MAX_ROWS = 1 << 48


def rows_for_step(n_rows: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The rows of one step: places `step * batch_size` and on of the endless sequence.

    Args:
        n_rows: rows in the dataset.
        batch_size: rows per step, over all devices and hosts.
        seed: any integer; another seed gives another sequence.
        step: counts from 0.

    Returns:
        int64[batch_size], each in [0, n_rows).

    Raises:
        InputError: no rows, an empty batch or a negative step.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}.")
    return rows(n_rows, seed, step * batch_size, batch_size)


def rows(n_rows: int, seed: int, start: int, count: int) -> NDArray[np.int64]:
    """Places `start` to `start + count` of the endless sequence of rows that (n_rows, seed) defines.

    Args:
        n_rows: rows in the dataset.
        seed: any integer.
        start: rows consumed before; all that a resume has to know.
        count: how many rows to return.

    Returns:
        int64[count], each in [0, n_rows).

    Raises:
        InputError: no rows, or a negative place or count.
    """
    if not 1 <= n_rows < _MAX_ROWS:
        raise InputError(f"the data must have between 1 and 2**48 rows to be ordered, found {n_rows}.")
    if start < 0 or count < 0:
        raise InputError(f"rows are counted from 0, found start {start} and count {count}.")
    place = start % n_rows + np.arange(count, dtype=np.int64)
    epoch = (start // n_rows + place // n_rows).astype(np.uint64)
    return _permute((place % n_rows).astype(np.uint64), n_rows, _epoch_key(seed, epoch)).astype(np.int64)


def host_slice(indices: NDArray[np.int64], process_index: int, process_count: int) -> NDArray[np.int64]:
    """The part of a step's rows that one host reads: equal runs in the order of the hosts.

    Args:
        indices: int64[B], what `rows_for_step` returned; the same on every host.
        process_index: this host, from 0.
        process_count: how many hosts there are.

    Returns:
        int64[B / process_count], a view.

    Raises:
        InputError: the hosts do not divide the batch, or there is no such host.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise InputError(f"process {process_index} of {process_count} does not exist; count processes from 0.")
    if len(indices) % process_count:
        raise InputError(
            f"a batch of {len(indices)} rows does not divide by {process_count} processes; change train.batch_size."
        )
    share = len(indices) // process_count
    return indices[process_index * share : (process_index + 1) * share]


def _permute(place: NDArray[np.uint64], n: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """place[i] -> its image under the permutation of [0, n) that key[i] names."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    out = _feistel(place, a, b, key)
    # Fewer than `a` values of the a * b lie beyond n, so this loop is rarely entered. Following the cycle until it
    # comes back inside gives a permutation of [0, n): the start was inside, so it does come back.
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(out[outside], a, b, key[outside])
        outside = outside[out[outside] >= n]
    return out


def _feistel(value: NDArray[np.uint64], a: int, b: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed permutation of [0, a * b). Each half round adds to one part a function of the other, so it inverts."""
    width_a, width_b = np.uint64(a), np.uint64(b)
    y, x = np.divmod(value, width_a)
    counters = key + _ROUND_OFFSETS  # [ROUNDS, count]
    for i in range(0, ROUNDS, 2):
        # The shift leaves room for the sum: a sum that wrapped at 2**64 would not be a bijection modulo a.
        x = (x + (_mix(counters[i] + y) >> _HALVE)) % width_a
        y = (y + (_mix(counters[i + 1] + x) >> _HALVE)) % width_b
    return x + width_a * y


def _epoch_key(seed: int, epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One 64-bit key per epoch; the seed is scrambled first, so that (seed, epoch + 1) is not (seed + 1, epoch)."""
    scrambled = _mix(np.array([(seed + _GAMMA) % _WORD], dtype=np.uint64))
    return _mix(scrambled + (epoch + np.uint64(1)) * np.uint64(_GAMMA))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function, a bijection of the 64-bit words; arrays wrap around silently, as it needs."""
    z = z ^ (z >> _SHIFT_1)
    z *= _FACTOR_1
    z ^= z >> _SHIFT_2
    z *= _FACTOR_2
    z ^= z >> _SHIFT_3
    return z
