"""The draw against Python integers, the exact distribution, and itself in other batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.sample import filter_logits, sample_token
from jaxlm.sample.sampler import draw_kept

ROWS, VOCAB = 270, 1000  # as in test_filters.py, whose programs are used
BAD = {3: "nan", 4: "negative nan", 6: "all -inf", 8: "negative temperature", 40: "nan", 45: "all -inf", 50: "nan p"}


def requests():
    """Rows of mixed options."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(ROWS, VOCAB)) * rng.choice([0.1, 2, 5], (ROWS, 1))).astype(np.float32)
    x[::5] = np.round(x[::5])
    x[1::5, 100:] = -np.inf
    options = {
        "temperature": rng.choice([0, 0.7, 1, 1.3], ROWS).astype(np.float32),
        "top_k": rng.choice([0, 1, 3, 20, 300, 5000], ROWS).astype(np.int32),
        "top_p": rng.choice([0.5, 0.9, 1], ROWS).astype(np.float32),
        "min_p": rng.choice([0, 0, 0.1], ROWS).astype(np.float32),
        "typical_p": rng.choice([0.3, 0.8, 1, 1], ROWS).astype(np.float32),
    }
    return x, options


@pytest.fixture(scope="module")
def drawn():
    """Keys, rows some of which are bad, their options, and what was drawn from them."""
    x, options = requests()
    for row, what in BAD.items():
        match what:
            case "nan":
                x[row, 17] = np.nan
            case "negative nan":
                x[row, 0] = np.copysign(np.nan, -1)
            case "all -inf":
                x[row] = -np.inf
            case "negative temperature":
                options["temperature"][row] = -1
            case "nan p":
                options["typical_p"][row] = np.nan
    options["temperature"][3] = 0.0  # NaN is no greedy token either
    keys = jax.random.split(jax.random.key(1), ROWS)
    return keys, x, options, np.asarray(sample_token(keys, x, **options, window=0))


def pick(options, rows):
    return {name: value[rows] for name, value in options.items()}


def test_is_the_inverse_cdf_in_vocabulary_order(drawn):
    keys, x, options, tokens = drawn
    kept = np.asarray(filter_logits(x, **options)).astype(np.float64)
    u = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)) / 2**32
    for row in range(ROWS):
        if row in BAD:
            continue
        prob = np.exp(kept[row] - kept[row].max())
        cumulative = np.cumsum(prob) / prob.sum()
        want = int(np.argmax(cumulative > u[row]))
        assert tokens[row] == want
        assert np.isfinite(kept[row, tokens[row]])


def test_the_window_draws_the_same(drawn, window_suffices):
    keys, x, options, tokens = drawn
    # The window is looked at where every row's k is small and no tie at the k-th place reaches beyond it.
    options = options | {"top_k": np.random.default_rng(3).choice([1, 5, 20], ROWS).astype(np.int32)}
    untied = np.setdiff1d(np.arange(ROWS), np.arange(0, ROWS, 5))
    rows = np.resize(untied, ROWS)
    same = keys[rows], x[rows]
    windowed, searched = (np.asarray(sample_token(*same, **pick(options, rows), window=w)) for w in (40, 0))
    assert np.array_equal(windowed, searched)
    assert window_suffices(x[rows], 40, pick(options, rows)).all()  # it was taken
    assert not np.array_equal(searched, tokens[rows])


def test_a_row_alone_is_a_row_of_a_batch(drawn):
    keys, x, options, tokens = drawn
    for row in (*range(0, ROWS, 12), *BAD):
        assert int(sample_token(keys[row], x[row], **pick(options, row))) == tokens[row]


@pytest.mark.slow
def test_a_row_alone_is_one_of_vmap(drawn):
    keys, x, options, tokens = drawn
    mapped = jax.vmap(lambda key, row, options: sample_token(key, row, **options))(keys, x, options)
    assert np.array_equal(np.asarray(mapped), tokens)


def test_frequencies_are_the_probabilities(drawn):
    # At the shape of the other tests, since compiling costs more than drawing.
    calls, logits = 48, np.full(VOCAB, -np.inf, np.float32)
    places = np.array([0, 3, 511, 512, 700, 998, 999])
    logits[places] = [0.0, 1.0, -2.0, 0.5, 3.0, -np.inf, 0.5]
    rows = np.broadcast_to(logits, (ROWS, VOCAB))
    keys = jax.random.split(jax.random.key(7), (calls, ROWS))
    tokens = np.stack([sample_token(k, rows, temperature=1.5, window=0) for k in keys]).ravel()
    prob = np.exp(logits.astype(np.float64) / 1.5)
    expected = len(tokens) * prob / prob.sum()
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = (((counts - expected) ** 2)[possible] / expected[possible]).sum()
    assert statistic < 20.5  # chi-square with 5 degrees of freedom exceeds it with probability 0.001


def test_rows_without_a_distribution_are_flagged_and_harm_nobody(drawn):
    keys, _, _, tokens = drawn
    clean, options = requests()
    options["temperature"][3] = 0.0
    good = np.asarray(sample_token(keys, clean, **options, window=0))
    bad = list(BAD)
    assert tokens[bad].tolist() == [-1] * len(bad)
    assert (good >= 0).all()
    assert np.array_equal(np.delete(tokens, bad), np.delete(good, bad))


def test_bad_options_have_a_result():
    """As data they cannot be refused: p outside [0, 1] is off or greedy, k > V is off, other nonsense gives -1.

    All in one batch, where no row notices another.
    """
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    off = [{"top_p": 1.5}, {"top_k": VOCAB + 1}, {"top_k": -1}, {"min_p": -0.5}]
    greedy = [{"top_p": -0.5}, {"min_p": 1.5}, {"temperature": 0.0}]
    nothing = [{"temperature": -1.0}, {"temperature": np.nan}, {"top_p": np.nan}, {"temperature": np.inf}]
    rows = [{}, *off, *greedy, *nothing, {}, {}]  # the logits of the last two are bad
    rows += [{}] * (ROWS - len(rows))
    keys = jax.vmap(jax.random.key)(np.full(ROWS, 1))

    def draw(logits, rows):
        options = {name: np.array([{**plain, **row}[name] for row in rows]) for name in plain}
        return np.asarray(sample_token(keys, logits, **options, window=0)).tolist()

    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:, :5] = [0.5, 3.0, 2.9, -1.0, 2.8]
    (plainly,) = set(draw(logits, [{}] * ROWS))
    assert plainly not in (-1, 1)  # so that it differs from what greedy and bad rows give
    logits[12, 2], logits[13] = np.nan, -np.inf
    assert draw(logits, rows) == [plainly] * 5 + [1] * 3 + [-1] * 6 + [plainly] * (ROWS - 14)


def test_all_greedy_is_the_first_largest(drawn):
    keys, tied = drawn[0], np.round(requests()[0])
    assert np.array_equal(sample_token(keys, tied, temperature=0, window=0), tied.argmax(-1))


def test_without_filters_the_draw_is_that_from_filtered_logits(drawn):
    keys, x, options, tokens = drawn
    assert np.array_equal(jax.jit(draw_kept)(keys, filter_logits(x, **options)), tokens)


@pytest.mark.slow
def test_numbers_of_64_bits_change_nothing(drawn):
    keys, x, options, tokens = drawn
    jax.config.update("jax_enable_x64", True)
    try:
        assert np.array_equal(np.asarray(sample_token(keys, x, **options, window=40)), tokens)
        kept = np.asarray(filter_logits(x, **options, window=40))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert np.array_equal(kept, np.asarray(filter_logits(x, **options, window=40)), equal_nan=True)


def test_keys_must_match_the_rows():
    for keys in (jax.random.split(jax.random.key(0), 3), jax.random.key_data(jax.random.key(0))):
        with pytest.raises(InputError, match=r"expected typed keys of shape \(2,\)"):
            sample_token(keys, jnp.zeros((2, 4)))


def test_a_batch_without_rows():
    none = jnp.zeros((0, 50))
    assert filter_logits(none, top_k=5, top_p=0.9).shape == (0, 50)
    assert sample_token(jax.random.split(jax.random.key(0), 4)[:0], none, top_p=0.9).shape == (0,)
