"""The draw against Python integers, the exact distribution, and itself in other batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.sample import filter_logits, sample_token

ROWS, VOCAB = 64, 1000
OPTIONS = ("temperature", "top_k", "top_p", "min_p")


@pytest.fixture(scope="module")
def drawn():
    """Rows of mixed options and what was drawn from them; in the second half every k is small."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(ROWS, VOCAB)) * rng.choice([0.1, 2, 5], (ROWS, 1))).astype(np.float32)
    x[::5] = np.round(x[::5])
    x[1::5, 100:] = -np.inf
    options = {
        "temperature": rng.choice([0, 0.7, 1, 1.3], ROWS).astype(np.float32),
        "top_k": np.where(np.arange(ROWS) < 32, rng.choice([0, 3, 300], ROWS), rng.choice([1, 5, 20], ROWS)),
        "top_p": rng.choice([0.5, 0.9, 1], ROWS).astype(np.float32),
        "min_p": rng.choice([0, 0, 0.1], ROWS).astype(np.float32),
    }
    keys = jax.random.split(jax.random.key(1), ROWS)
    return keys, x, options, np.asarray(sample_token(keys, x, **options, window=0))


def pick(options, rows):
    return {name: value[rows] for name, value in options.items()}


def test_is_the_inverse_cdf_in_vocabulary_order(drawn):
    keys, x, options, tokens = drawn
    kept = np.asarray(filter_logits(x, **options)).astype(np.float64)
    u = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)) / 2**32
    for row in range(ROWS):
        prob = np.exp(kept[row] - kept[row].max())
        cumulative = np.cumsum(prob) / prob.sum()
        want = int(np.argmax(cumulative > u[row]))
        assert tokens[row] == want
        assert np.isfinite(kept[row, tokens[row]])


def test_the_window_draws_the_same(drawn):
    keys, x, options, tokens = drawn
    half = np.arange(32, 64)
    windowed = sample_token(keys[half], x[half], **pick(options, half), window=40)
    assert np.array_equal(np.asarray(windowed), tokens[half])


def test_a_row_alone_is_a_row_of_a_batch_and_of_vmap(drawn):
    keys, x, options, tokens = drawn
    for row in range(0, ROWS, 3):
        assert int(sample_token(keys[row], x[row], **pick(options, row))) == tokens[row]
    mapped = jax.vmap(lambda key, row, options: sample_token(key, row, **options))(keys, x, options)
    assert np.array_equal(np.asarray(mapped), tokens)


def test_frequencies_are_the_probabilities():
    n, logits = 40_000, np.array([0.0, 1.0, -2.0, 0.5, 3.0, -np.inf, 0.5], np.float32)
    keys = jax.random.split(jax.random.key(7), n)
    tokens = np.asarray(sample_token(keys, np.broadcast_to(logits, (n, 7)), temperature=1.5))
    prob = np.exp(logits.astype(np.float64) / 1.5)
    expected = n * prob / prob.sum()
    counts = np.bincount(tokens, minlength=7)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = (((counts - expected) ** 2)[possible] / expected[possible]).sum()
    assert statistic < 20.5  # chi-square with 5 degrees of freedom exceeds it with probability 0.001


def test_rows_without_a_distribution_are_flagged_and_harm_nobody(drawn):
    keys, x, options, tokens = drawn
    x = x.copy()
    x[3, 17], x[4, 0], x[6] = np.nan, np.copysign(np.nan, -1), -np.inf
    temperature = options["temperature"].copy()
    temperature[[3, 8]] = 0.0, -1.0
    out = np.asarray(sample_token(keys, x, **{**options, "temperature": temperature}, window=0))
    bad = [3, 4, 6, 8]
    assert out[bad].tolist() == [-1] * 4
    assert np.array_equal(np.delete(out, bad), np.delete(tokens, bad))


def test_all_greedy_is_the_first_largest(drawn):
    keys, x, _, _ = drawn
    tied = np.round(x)
    assert np.array_equal(sample_token(keys, tied, temperature=0, window=0), tied.argmax(-1))


def test_keys_must_match_the_rows():
    for keys in (jax.random.split(jax.random.key(0), 3), jax.random.key_data(jax.random.key(0))):
        with pytest.raises(InputError, match=r"expected typed keys of shape \(2,\)"):
            sample_token(keys, jnp.zeros((2, 4)))
