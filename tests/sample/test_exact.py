"""The integer arithmetic under the sampler, against Python's own integers and float64."""

from __future__ import annotations

import jax
import numpy as np

from jaxlm.sample import exact


def as_int(digits: exact.Digits) -> list[int]:
    """Multiples of 2**-40, as Python integers."""
    units, high, low = (np.asarray(d).astype(object).reshape(-1) for d in digits)
    return list((units * 2**20 + high) * 2**20 + low)


def random_digits(rng: np.random.Generator, n: int) -> exact.Digits:
    limits = (2**19, 2**20, 2**20)
    return exact.Digits(*(rng.integers(0, limit, n).astype(np.int32) for limit in limits))


def test_exp_is_within_two_units_in_the_last_place():
    d = np.append(np.linspace(-28, 0, 200_001), [0.0, -29.0, -np.inf]).astype(np.float32)
    got = np.asarray(jax.jit(exact.exp)(d))
    assert got[-3:].tolist() == [1.0, 0.0, 0.0]
    d, got = d[:-3], got[:-3]
    want = np.exp(d.astype(np.float64))
    assert np.max(np.abs(got - want) / np.spacing(want.astype(np.float32))) < 2
    assert np.all(np.diff(got) >= 0)


def test_exp_has_the_same_bits_in_any_array():
    # jnp.exp fails this: a short array takes another code path than a long one on CPU.
    d = -np.abs(np.random.default_rng(0).normal(size=(4, 1001)) * 6).astype(np.float32)
    whole = np.asarray(jax.jit(exact.exp)(d))
    for n in (1, 7, 64):
        assert np.array_equal(np.asarray(jax.jit(exact.exp)(d[:, :n])), whole[:, :n])
    # Fused behind a subtraction and in front of a sum.
    fused = jax.jit(lambda x, m: exact.exp(x - m[:, None]))(d + 1, np.ones(4, np.float32))
    assert np.array_equal(np.asarray(fused), np.asarray(jax.jit(exact.exp)((d + 1) - 1)))


def test_limbs_are_the_number_cut_to_forty_bits():
    x = np.concatenate([np.random.default_rng(1).random(500), [0.0, 1.0, 2.0**-40, 2.0**-41]]).astype(np.float32)
    high, low = (np.asarray(limb).astype(object) for limb in jax.jit(exact.limbs)(x))
    assert list(high * 2**20 + low) == [int(float(v) * 2**40) for v in x]


def test_sums_are_those_of_integers():
    x = np.random.default_rng(2).random((3, 1024, 512)).astype(np.float32)
    x[0] = 1.0  # the largest sum there is room for: a full vocabulary, all equally likely
    mask = np.random.default_rng(4).random((3, 5, 512)) < 0.5

    @jax.jit
    def sums(x, mask):
        blocks = exact.block_sums(exact.limbs(x))
        return exact.add_up(blocks), exact.running(blocks), exact.sums_where(mask, exact.limbs(x[:, 0]))

    total, running, some = sums(x, mask)
    quanta = np.floor(x.astype(np.float64) * 2**40).astype(np.int64)  # exact in float64
    assert as_int(total) == [int(v) for v in quanta.sum((1, 2))]
    assert as_int(running) == [int(v) for v in quanta.sum(2).cumsum(1).reshape(-1)]
    assert as_int(some) == [int(v) for v in (mask * quanta[:, :1]).sum(2).reshape(-1)]


def test_scaled_compared_and_added_as_python_integers():
    rng = np.random.default_rng(3)
    a, b = random_digits(rng, 400), random_digits(rng, 400)
    b = b._replace(units=np.where(np.arange(400) % 3 == 0, a.units, b.units))
    fraction = [rng.integers(0, 4097, 400).astype(np.int32) for _ in range(3)]
    parts = [np.asarray(part).astype(object) for part in fraction]
    numerator = (parts[0] * 2**12 + parts[1]) * 2**12 + parts[2]
    all_three = jax.jit(lambda a, b, fraction: (exact.scaled(a, fraction), exact.plus(a, b), exact.above(a, b)))
    scaled, added, is_above = all_three(a, b, fraction)
    assert as_int(scaled) == [x * n >> 36 for x, n in zip(as_int(a), numerator, strict=True)]
    assert as_int(added) == [x + y for x, y in zip(as_int(a), as_int(b), strict=True)]
    assert np.asarray(is_above).tolist() == [x > y for x, y in zip(as_int(a), as_int(b), strict=True)]


def test_sortable_keeps_the_order_of_floats():
    x = np.array([-np.inf, -3e38, -1.0, -1e-30, -0.0, 0.0, 1e-30, 1.0, 3e38, np.inf], np.float32)
    key, back = map(np.asarray, jax.jit(lambda x: (exact.sortable(x), exact.unsortable(exact.sortable(x))))(x))
    assert np.array_equal(np.sign(np.diff(key.astype(np.int64))), np.sign(np.diff(x)))
    assert np.array_equal(back, x)
