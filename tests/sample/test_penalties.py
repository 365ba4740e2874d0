"""Penalties against arithmetic done by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxlm.sample import penalties

X = jnp.array([[2.0, -2.0, 1.0, 0.0], [4.0, 3.0, -1.0, 0.5]])
HISTORY = jnp.array([[0, 1, 0, -1], [2, -1, -1, 7]])  # -1 and 7 are outside the vocabulary


def test_repetition_divides_positive_and_multiplies_negative_logits_once():
    got = penalties.repetition(X, HISTORY, jnp.array([2.0, 4.0]))
    assert np.array_equal(got, [[1.0, -4.0, 1.0, 0.0], [4.0, 3.0, -4.0, 0.5]])


def test_presence_subtracts_once():
    assert np.array_equal(penalties.presence(X, HISTORY, 0.5), [[1.5, -2.5, 1.0, 0.0], [4.0, 3.0, -1.5, 0.5]])


def test_frequency_subtracts_for_each_occurrence():
    got = penalties.frequency(X, HISTORY, jnp.array([0.5, 1.0]))
    assert np.array_equal(got, [[1.0, -2.5, 1.0, 0.0], [4.0, 3.0, -2.0, 0.5]])


def test_bias_adds_and_ban_removes():
    ids = jnp.array([[3, 0, -1], [1, 9, -1]])
    got = penalties.bias(X, ids, jnp.array([[1.0, -jnp.inf, 5.0], [0.25, 5.0, 5.0]]))
    assert np.array_equal(got, [[-np.inf, -2.0, 1.0, 1.0], [4.0, 3.25, -1.0, 0.5]])
    got = penalties.ban(X, ids, jnp.array([True, False]))
    assert np.array_equal(got, [[-np.inf, -2.0, 1.0, -np.inf], X[1]])


def test_one_row_works_as_a_batch_does():
    for penalty in (penalties.repetition, penalties.presence, penalties.frequency):
        assert np.array_equal(penalty(X[0], HISTORY[0], 3.0), penalty(X, HISTORY, 3.0)[0])
        assert np.array_equal(penalty(X[0], HISTORY[0, :0], 3.0), X[0])
