"""The order of rows: a bijection each epoch, one sequence for all batch sizes, the same numbers for ever."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from jaxlm.data import order
from jaxlm.errors import InputError


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 10, 127, 128, 129, 1000, 1025, 4097])
def test_every_epoch_visits_each_row_once(n: int) -> None:
    epochs = order.rows(n, seed=3, start=0, count=3 * n).reshape(3, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (3, 1)))


def test_a_large_odd_count_is_a_bijection_too() -> None:
    n = 1_000_003  # prime, so a * b > n and cycles are walked
    seen = np.concatenate([order.rows(n, 11, start, 50_000) for start in range(0, n - n % 50_000, 50_000)])
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < n


def test_epochs_and_seeds_differ() -> None:
    first, second = order.rows(1000, 0, 0, 2000).reshape(2, 1000)
    other = order.rows(1000, 1, 0, 1000)
    # Two random orders agree in one place of 1000 on average (a Poisson count of mean 1).
    assert (first == second).sum() < 8
    assert (first == other).sum() < 8
    assert (second == other).sum() < 8  # seed 0, epoch 1 is not seed 1, epoch 0
    assert (first == np.arange(1000)).sum() < 8


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_batches_are_slices_of_one_sequence(batch_size: int) -> None:
    n = 10  # a batch of 64 covers more than six epochs
    whole = order.rows(n, 5, 0, 192)
    steps = [order.rows_for_step(n, batch_size, 5, step) for step in range(192 // batch_size)]
    np.testing.assert_array_equal(np.concatenate(steps), whole)
    assert steps[0].dtype == np.int64


def test_a_batch_straddles_epochs() -> None:
    n, batch_size = 10, 4  # step 2 has places 8 to 11: two of epoch 0 and two of epoch 1
    batch = order.rows_for_step(n, batch_size, 0, 2)
    epoch_0, epoch_1 = order.rows(n, 0, 0, 10), order.rows(n, 0, 10, 10)
    np.testing.assert_array_equal(batch, [*epoch_0[8:], *epoch_1[:2]])


def test_resume_needs_only_the_rows_consumed() -> None:
    np.testing.assert_array_equal(order.rows(77, 9, 1234, 50), order.rows(77, 9, 0, 1284)[1234:])
    far = order.rows(77, 9, 77 * 10**12 + 5, 3)  # epoch 10**12
    assert far.min() >= 0
    assert far.max() < 77


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_the_first_place_is_uniform_over_rows(n: int) -> None:
    draws = 200 * n
    counts = np.bincount([order.rows(n, 42, epoch * n, 1)[0] for epoch in range(draws)], minlength=n)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    # Mean n - 1 and variance 2 (n - 1): five standard deviations.
    assert chi_square < (n - 1) + 5 * math.sqrt(2 * (n - 1))


def test_all_orders_of_three_rows_occur_equally_often() -> None:
    epochs = order.rows(3, 0, 0, 3 * 6000).reshape(6000, 3)
    _, counts = np.unique(epochs @ [9, 3, 1], return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 5 + 5 * math.sqrt(10)


def test_neighbours_are_scattered() -> None:
    n = 100_000
    gaps = np.abs(np.diff(order.rows(n, 0, 0, 5000)))
    # Two independent uniform places lie n / 3 apart on average, with a standard deviation of n / sqrt(18).
    assert abs(gaps.mean() - n / 3) < 5 * n / math.sqrt(18 * 5000) * 1.5


def test_the_round_function_is_splitmix64() -> None:
    # First outputs of splitmix64 from seed 1234567, the test vector that implementations share
    # (Rosetta Code, "Pseudo-random numbers/Splitmix64").
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in (1, 2, 3)], dtype=np.uint64)
    assert order._mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def _plain(n: int, seed: int, place: int) -> int:
    """The definition in Python's integers: generalised Feistel rounds (Black and Rogaway 2002) on splitmix64."""
    word, gamma = 2**64, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ z >> 27) * 0x94D049BB133111EB % word
        return z ^ z >> 31

    epoch, value = divmod(place, n)
    key = mix((mix((seed + gamma) % word) + (epoch + 1) * gamma) % word)
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        y, x = divmod(value, a)
        for i in range(8):
            counter = key + i * gamma
            if i % 2 == 0:
                x = (x + mix((counter + y) % word) // 2) % a
            else:
                y = (y + mix((counter + x) % word) // 2) % b
        value = x + a * y
        if value < n:
            return value


@pytest.mark.parametrize("n", [1, 2, 5, 129, 1_000_003, 2**40 + 1])
@pytest.mark.parametrize("seed", [0, 7, 2**63, -1])
def test_numpy_agrees_with_plain_integers(n: int, seed: int) -> None:
    start = 5 * n - 3
    assert order.rows(n, seed, start, 6).tolist() == [_plain(n, seed, place) for place in range(start, start + 6)]


def test_golden_values() -> None:
    """A change here reorders the data of every run that is under way: raise the stages' VERSION, and say so."""
    assert order.rows(10, 0, 0, 20).tolist() == [9, 0, 4, 6, 8, 3, 2, 7, 1, 5, 2, 7, 1, 5, 3, 0, 9, 6, 4, 8]
    assert order.rows(1_000_003, 1234, 999_999, 8).tolist() == [
        250908, 835488, 700070, 751346, 69768, 995449, 489590, 271569,
    ]  # fmt: skip
    assert order.rows_for_step(100, 4, 7, 30).tolist() == [61, 8, 0, 23]


def test_host_slices_make_up_the_batch() -> None:
    batch = order.rows_for_step(1000, 12, 0, 3)
    np.testing.assert_array_equal(np.concatenate([order.host_slice(batch, i, 4) for i in range(4)]), batch)
    np.testing.assert_array_equal(order.host_slice(batch, 1, 3), batch[4:8])


def test_bad_input() -> None:
    with pytest.raises(InputError, match="12 rows does not divide by 5 processes"):
        order.host_slice(np.arange(12), 0, 5)
    with pytest.raises(InputError, match="process 4 of 4"):
        order.host_slice(np.arange(12), 4, 4)
    with pytest.raises(InputError, match="found 0"):
        order.rows(0, 0, 0, 1)
    with pytest.raises(InputError, match="batch_size"):
        order.rows_for_step(10, 0, 0, 0)
    with pytest.raises(InputError, match="counted from 0"):
        order.rows_for_step(10, 4, 0, -1)


def test_a_batch_takes_a_fraction_of_a_millisecond() -> None:
    def once(start: int) -> float:
        began = time.perf_counter()
        for step in range(start, start + 50):
            order.rows_for_step(1_000_000, 64, 0, step)
        return (time.perf_counter() - began) / 50

    # About 0.12 ms on one idle core; the best of many tries, and room for a busy machine.
    assert min(once(50 * i) for i in range(20)) < 0.6e-3
