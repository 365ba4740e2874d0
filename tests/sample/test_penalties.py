"""Penalties against arithmetic done by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.sample import penalties

QUICK_COMPILE = True

X = jnp.array([[2.0, -2.0, 1.0, 0.0], [4.0, 3.0, -1.0, 0.5]])
HISTORY = jnp.array([[0, 1, 0, -1], [2, -1, -1, 7]])  # -1 and 7 are outside the vocabulary
IDS = jnp.array([[3, 0, -1], [1, 9, -1]])
TWICE = (penalties.repetition, penalties.presence, penalties.frequency)


@jax.jit
def all_together():
    """Each penalty on X: one program, for each by itself takes longer to compile than to read."""
    return {
        "repetition": penalties.repetition(X, HISTORY, jnp.array([2.0, 4.0])),
        "presence": penalties.presence(X, HISTORY, 0.5),
        "frequency": penalties.frequency(X, HISTORY, jnp.array([0.5, 1.0])),
        "bias": penalties.bias(X, IDS, jnp.array([[1.0, -jnp.inf, 5.0], [0.25, 5.0, 5.0]])),
        "ban": penalties.ban(X, IDS, jnp.array([True, False])),
        "least": penalties.min_new_tokens(X, jnp.array([[3, -1], [0, 1]]), jnp.array([2, 2]), jnp.array([2, 3])),
        "rows": [penalty(X, HISTORY, 3.0)[0] for penalty in TWICE],
        "alone": [penalty(X[0], HISTORY[0], 3.0) for penalty in TWICE],
        "no history": [penalty(X[0], HISTORY[0, :0], 3.0) for penalty in TWICE],
    }


@pytest.fixture(scope="module")
def got():
    return jax.device_get(all_together())


def test_repetition_divides_positive_and_multiplies_negative_logits_once(got):
    assert np.array_equal(got["repetition"], [[1.0, -4.0, 1.0, 0.0], [4.0, 3.0, -4.0, 0.5]])


def test_presence_subtracts_once(got):
    assert np.array_equal(got["presence"], [[1.5, -2.5, 1.0, 0.0], [4.0, 3.0, -1.5, 0.5]])


def test_frequency_subtracts_for_each_occurrence(got):
    assert np.array_equal(got["frequency"], [[1.0, -2.5, 1.0, 0.0], [4.0, 3.0, -2.0, 0.5]])


def test_bias_adds_and_ban_removes(got):
    assert np.array_equal(got["bias"], [[-np.inf, -2.0, 1.0, 1.0], [4.0, 3.25, -1.0, 0.5]])
    assert np.array_equal(got["ban"], [[-np.inf, -2.0, 1.0, -np.inf], X[1]])


def test_no_stop_before_the_least_length(got):
    assert np.array_equal(got["least"], [X[0], [-np.inf, -np.inf, -1.0, 0.5]])


def test_one_row_works_as_a_batch_does(got):
    assert np.array_equal(got["alone"], got["rows"])
    assert not np.array_equal(got["alone"], [X[0]] * 3)
    assert np.array_equal(got["no history"], [X[0]] * 3)


def banned_after(ids, n):
    """By looking up every n-gram of the list."""
    if n == 0 or len(ids) < n:
        return set()
    prefix = ids[len(ids) - n + 1 :]
    return {ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == prefix}


def histories(rows, width, vocab, seed):
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, vocab, rng.integers(0, width + 1)).tolist() for _ in range(rows)]
    lists[0], lists[1] = [2] * width, []
    return lists, np.array([ids + [-1] * (width - len(ids)) for ids in lists], np.int32)


def test_no_ngram_comes_twice():
    rows, width, vocab = 200, 12, 3
    lists, padded = histories(rows, width, vocab, 0)
    n = np.arange(rows) % 7
    n[-1] = 2**31 - 1
    x = np.random.default_rng(1).normal(size=(rows, vocab)).astype(np.float32)
    out = np.asarray(jax.jit(penalties.no_repeat_ngram)(x, padded, n))
    for row in range(rows):
        want = x[row].copy()
        want[list(banned_after(lists[row], n[row]))] = -np.inf
        assert np.array_equal(out[row], want), (lists[row], n[row])
    assert np.isneginf(out).any(1).sum() > 50  # the lists do repeat themselves
    assert np.array_equal(jax.jit(penalties.no_repeat_ngram)(x[5], padded[5], 5), out[5])
    assert np.array_equal(penalties.no_repeat_ngram(x, padded[:, :0], 2), x)


@pytest.mark.parity
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ngrams_are_banned_as_by_transformers(n):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    lists, padded = histories(40, 30, 4, n)
    x = np.random.default_rng(n).normal(size=(40, 4)).astype(np.float32)
    ours = np.asarray(penalties.no_repeat_ngram(jnp.asarray(x), jnp.asarray(padded), n))
    processor = transformers.NoRepeatNGramLogitsProcessor(n)
    for row, ids in enumerate(lists):
        if ids:
            theirs = processor(torch.tensor([ids]), torch.from_numpy(x[row : row + 1].copy())).numpy()[0]
            assert np.array_equal(ours[row], theirs), ids
