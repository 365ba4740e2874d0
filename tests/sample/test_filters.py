"""The filters against a reference that sorts, written from the rules in DESIGN.md with float64 sums."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.sample import cuts, filter_logits, filters

INF = np.inf
ROWS, VOCAB = 270, 1000  # the shape of almost all tests, here and in test_sampler.py: few programs are compiled


def reference(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """Kept logits of one row, by sorting."""
    x = np.asarray(x, np.float32)
    if temperature == 0:
        return np.where(np.arange(len(x)) == x.argmax(), x, -INF)
    y = x / np.float32(temperature)
    keep = np.ones(len(y), bool)
    if 0 < top_k < len(y):
        keep &= y >= np.sort(y)[-top_k]
    prob = np.where(keep, np.exp(y.astype(np.float64) - y.max()), 0.0)
    if top_p < 1:
        order = np.argsort(y, kind="stable")
        no_more_likely = np.searchsorted(y[order], y, side="right")  # how many, ties included
        tail = np.cumsum(prob[order])[no_more_likely - 1]
        keep &= (tail > (1 - np.float64(np.float32(top_p))) * prob.sum()) | (y == y.max())
    keep &= prob >= min_p
    if typical_p < 1:
        prob = np.where(keep, prob, 0.0)
        below = y - y.max()
        mean = (prob * np.where(keep, below, 0)).sum() / prob.sum()
        away = np.abs(below - np.float32(mean))
        order = np.argsort(away, kind="stable")
        no_farther = np.searchsorted(away[order], away, side="right")  # how many, ties included
        reaches = np.cumsum(prob[order])[no_farther - 1] >= (1 - (1 - np.float64(np.float32(typical_p)))) * prob.sum()
        keep &= away <= away[keep & reaches].min()
    return np.where(keep, y, -INF)


def logits_of_kind(kind: str, vocab: int, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=vocab) * 3
    match kind:
        case "tied":
            x = np.round(x)
        case "peaked":
            x[rng.integers(vocab)] += 30
        case "flat":
            x = np.full(vocab, 0.25)
        case "nearly flat":
            x = 1 + rng.normal(size=vocab) * 1e-6
        case "banned":
            x[rng.random(vocab) < 0.7] = -INF
            x[rng.integers(vocab)] = 1.0
        case "huge":
            x *= 1e4
        case "masked":
            x[rng.random(vocab) < 0.5] = -1e30
        case "bf16":
            x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
    return x.astype(np.float32)


KINDS = ("normal", "tied", "peaked", "flat", "nearly flat", "banned", "huge", "masked", "bf16")


def cases(vocab: int, rows: int, seed: int):
    rng = np.random.default_rng(seed)
    x = np.stack([logits_of_kind(KINDS[i % len(KINDS)], vocab, rng) for i in range(rows)])
    options = {
        "temperature": rng.choice([0, 0.3, 0.7, 1, 1, 1.5], rows).astype(np.float32),
        "top_k": rng.choice([0, 0, 1, 2, 5, 50, vocab - 1, vocab, vocab + 3], rows).astype(np.int32),
        "top_p": rng.choice([0, 0.1, 0.5, 0.9, 0.999, 1], rows).astype(np.float32),
        "min_p": rng.choice([0, 0, 0.05, 0.5, 1], rows).astype(np.float32),
        "typical_p": rng.choice([0, 0.1, 0.5, 0.9, 0.99, 1, 1, 1], rows).astype(np.float32),
    }
    return x, options


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("vocab", "rows"), [(VOCAB, ROWS), slow(1, 20), slow(7, 180), slow(50257, 9)])
def test_keeps_what_sorting_keeps_on_both_paths(vocab, rows, window_suffices):
    x, options = cases(vocab, rows, seed=vocab)
    searched = np.asarray(filter_logits(x, **options, window=0))
    for i in range(rows):
        row = {name: value[i] for name, value in options.items()}
        assert np.array_equal(searched[i], reference(x[i], **row)), (KINDS[i % len(KINDS)], row)
    if vocab == 1:
        return
    # Where every row's k is below the window, lax.top_k decides, unless a tie reaches beyond: so once with all rows,
    # and once with those of them, over and over, whose ties end within the window.
    options["top_k"] = np.where(options["temperature"] == 0, 0, np.clip(options["top_k"], 1, min(20, vocab))).astype(
        np.int32
    )
    hot = np.where(options["temperature"] == 0, 1, options["temperature"])[:, None]
    y = (x / hot).astype(np.float32)
    at_k = -np.sort(-y)[np.arange(rows), np.maximum(options["top_k"], 1) - 1]
    ends = np.flatnonzero((options["temperature"] == 0) | ((y >= at_k[:, None]).sum(1) < 40))
    assert len({KINDS[i % len(KINDS)] for i in ends}) > 4
    for some in (np.arange(rows), np.resize(ends, rows)):
        picked = {name: value[some] for name, value in options.items()}
        windowed = np.asarray(filter_logits(x[some], **picked, window=40))
        assert np.array_equal(windowed, np.asarray(filter_logits(x[some], **picked, window=0)))
    assert window_suffices(x[some], 40, picked).all()  # it was taken


@pytest.mark.slow
def test_a_window_of_any_width_keeps_what_the_search_keeps():
    """Nearly flat: sums over more than 1024 tokens would overflow, so that is as wide as a window gets."""
    x = np.random.default_rng(7).normal(size=(1, 5000)).astype(np.float32) * 1e-3
    for k in (1000, 2999):
        want = np.asarray(filter_logits(x, top_k=k, top_p=0.5, window=0))
        assert np.array_equal(want[0], reference(x[0], top_k=k, top_p=0.5))
        assert np.array_equal(np.asarray(filter_logits(x, top_k=k, top_p=0.5, window=3000)), want)


def test_the_width_of_a_window():
    assert [cuts.width(5000, window) for window in (0, 7, 1024, 3000, None)] == [0, 7, 1024, 1024, 0]
    assert [cuts.width(1000, window) for window in (3000, None)] == [1000, 0]
    assert cuts.width(8192, None) == 64
    for window, message in ((-1, "must be at least 0, found -1"), (2.5, "must be an integer, found 2.5")):
        with pytest.raises(InputError, match=f"window: {message}"):
            filter_logits(np.zeros((1, 4)), window=window)


def test_the_most_likely_of_a_large_vocabulary_are_found_by_groups():
    x = np.random.default_rng(4).normal(size=(3, 33_001)).astype(np.float32) * 3
    x[1] = np.round(x[1])  # ties, and in the last row few that are possible
    x[2, 50:] = -INF
    values, places = map(np.asarray, jax.jit(cuts.most_likely, static_argnums=1)(x, 64))
    assert np.array_equal(values, -np.sort(-x)[:, :64])
    assert np.array_equal(np.take_along_axis(x, places, axis=1), values)
    assert [len(set(row)) for row in places[:2].tolist()] == [64, 64]
    # Not where int32 has no room for places in all rows together; gathered are members of groups.
    for rows, grouped in ((4, True), (2**17, False)):
        program = jax.make_jaxpr(lambda x: cuts.most_likely(x, 64))(jax.ShapeDtypeStruct((rows, 33_001), jnp.float32))
        assert ("gather" in str(program)) == grouped


def test_a_row_alone_is_a_row_of_a_batch():
    """And bfloat16 is worked on in float32: rows of such numbers, and the filtered ones are not."""
    x, options = cases(VOCAB, ROWS, seed=5)
    together = np.asarray(filter_logits(x, **options, window=0))
    for i in range(KINDS.index("bf16"), ROWS, len(KINDS)):
        alone = filter_logits(jnp.asarray(x[i], jnp.bfloat16), **{name: value[i] for name, value in options.items()})
        assert alone.dtype == jnp.float32
        assert np.array_equal(np.asarray(alone), together[i])


@pytest.mark.slow
def test_a_row_alone_is_one_of_vmap():
    x, options = cases(VOCAB, ROWS, seed=5)
    together = np.asarray(filter_logits(x, **options, window=0))
    few = {name: value[:9] for name, value in options.items()}
    mapped = jax.vmap(lambda row, options: filter_logits(row, **options))(x[:9], few)
    assert np.array_equal(np.asarray(mapped), together[:9])
    for i in range(0, ROWS, 10):
        alone = filter_logits(x[i], **{name: value[i] for name, value in options.items()})
        assert np.array_equal(np.asarray(alone), together[i])


def padded(row) -> np.ndarray:
    """A short row as one of the shape that all tests share, with logits of -inf for the rest of the vocabulary."""
    x = np.full((ROWS, VOCAB), -INF, np.float32)
    x[:, : len(row)] = row
    return x


def kept(row, **options) -> list[int]:
    return np.flatnonzero(np.isfinite(filter_logits(padded(row), **options)[0])).tolist()


def test_rules_by_hand():
    # Tail masses of (1/2, 1/4, 1/8, 1/8) are 1, 1/2, 1/4, 1/4. A token goes when its tail is at most 1 - p.
    x = np.array([0, -1, -2, -2]) * np.log(2)
    assert kept(x, top_p=0.8) == [0, 1, 2, 3]
    assert kept(x, top_p=0.74) == [0, 1]
    assert kept(x, top_p=0.45) == [0]
    assert kept(x, top_p=0.0) == [0]
    assert kept(x, top_k=3) == [0, 1, 2, 3]  # the third and the fourth are tied
    assert kept(x, top_k=2, top_p=0.6) == [0]  # renormalised: 2/3 and 1/3, and 1/3 <= 0.4
    assert kept(x, min_p=0.3) == [0, 1]
    # The entropy is 7/4 bits, the tokens' information 1, 2, 3 and 3, so 1/4 is nearest, then 1/2, then 1/8.
    assert kept(x, typical_p=0.2) == [1]
    assert kept(x, typical_p=0.3) == [0, 1]
    assert kept(x, typical_p=0.76) == [0, 1, 2, 3]  # the third and the fourth are tied
    assert kept(x, typical_p=0.0) == [1]
    assert kept(x, top_k=2, typical_p=0.5) == [0]  # of 2/3 and 1/3: 0.585 and 1.585 bits, entropy 0.918
    tied = np.log([0.3, 0.3, 0.3, 0.1])
    assert kept(tied, top_p=0.0) == [0, 1, 2]  # ties at the top all stay ...
    assert kept(tied, temperature=0.0) == [0]  # ... but argmax is the first of them
    assert kept([0.0, -0.0, -1.0, -2.0], top_k=1) == [0, 1]


def test_off_means_off_even_for_impossible_tokens():
    # exp(-200) is 0 in float32: p = 1 must not be a threshold.
    x = padded([0.0, -200.0, -1e30, 1.0])
    assert np.array_equal(filter_logits(x, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0), x)
    assert np.array_equal(filter_logits(x, top_p=2.0, top_k=-1, min_p=-1.0, typical_p=3.0), x)
    assert np.array_equal(filter_logits(x, top_k=VOCAB), x)
    assert np.array_equal(filter_logits(x, top_k=2**31 - 1), x)


def test_rows_without_a_distribution_leave_their_neighbours_alone():
    x, options = cases(VOCAB, ROWS, seed=1000)
    want = np.asarray(filter_logits(x, **options, window=0))
    x[3, 17], x[4, 500], x[5] = np.nan, np.copysign(np.nan, -1), -INF
    options["temperature"][[3, 6, 7, 8]] = 0, -1, np.nan, INF
    options["top_p"][9], options["min_p"][10], options["typical_p"][11] = np.nan, np.nan, np.nan
    out = np.asarray(filter_logits(x, **options, window=0))
    assert np.isnan(out[[3, 4, 6, 7, 8, 9, 10, 11]]).all()
    assert np.isneginf(out[5]).all()
    bad = np.arange(3, 12)
    assert np.array_equal(np.delete(out, bad, axis=0), np.delete(want, bad, axis=0))


def test_infinities_and_extreme_temperatures():
    out = filter_logits(padded([1.0, INF, 2.0, INF]), top_p=0.9, typical_p=0.9)
    assert np.array_equal(out, padded([-INF, INF, -INF, INF]))
    out = filter_logits(padded([-4.0, -5.0, -3.0, -9.0]), temperature=1e-38)
    assert np.array_equal(out, padded([-INF, -INF, -3.0, -INF]))


def test_each_filter_works_alone():
    x = np.random.default_rng(2).normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
    option = np.linspace(0, 1.1, ROWS, dtype=np.float32)
    k = np.arange(ROWS) % 9
    assert np.array_equal(filters.temperature(x, option), filter_logits(x, temperature=option))
    assert np.array_equal(filters.top_k(x, k), filter_logits(x, top_k=k))
    for alone, name in ((filters.top_p, "top_p"), (filters.min_p, "min_p"), (filters.typical, "typical_p")):
        assert np.array_equal(alone(x, option), filter_logits(x, **{name: option}))
        assert np.isneginf(alone(x, 0.5)).any()


def test_filters_one_after_another_are_all_of_them_at_once():
    x, options = cases(VOCAB, ROWS, seed=6)
    steps = (filters.temperature, filters.top_k, filters.top_p, filters.min_p, filters.typical)
    y = x
    for step, name in zip(steps, ("temperature", "top_k", "top_p", "min_p", "typical_p"), strict=True):
        y = step(y, options[name])
    assert np.array_equal(y, filter_logits(x, **options))


def test_gradient_reaches_kept_logits_only():
    x = jnp.array([0.0, 1.0, 2.0, 3.0])
    grad = jax.grad(lambda x: jnp.where(jnp.isfinite(y := filter_logits(x, temperature=0.5, top_k=2)), y, 0).sum())(x)
    assert grad.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_no_option_recompiles(compiled):
    x = padded([0.0])
    filter_logits(x)
    before = compiled.count("_filter")
    filter_logits(x, temperature=0, top_k=99, top_p=0.5)
    filter_logits(x, temperature=np.float32(2), top_k=np.array(1), top_p=jnp.array(0.3), min_p=0.3, typical_p=0.5)
    assert compiled.count("_filter") == before
    assert before > 0  # the counter counts


def test_an_impossible_vocabulary_is_refused():
    with pytest.raises(InputError, match="524288"):
        jax.eval_shape(filter_logits, jax.ShapeDtypeStruct((1, 2**19 + 1), jnp.float32))
    with pytest.raises(InputError, match="last axis"):
        filter_logits(jnp.zeros((2, 0)))


@pytest.mark.parity
@pytest.mark.parametrize("vocab", [1000, 50257])
def test_typical_is_that_of_transformers(vocab):
    """At masses half-way between two tokens' and distances far enough apart, so that no rounding decides."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(vocab)
    for p in (0.05, 0.2, 0.5, 0.7, 0.8):
        grid = np.unique(np.round(rng.normal(size=4 * vocab) * 3 * 2**16))
        x = (rng.choice(grid, vocab, replace=False) / 2**16).astype(np.float32)
        log_prob = x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum())
        away = np.abs(-log_prob + (np.exp(log_prob) * log_prob).sum())
        order = np.argsort(away)
        mass = np.cumsum(np.exp(log_prob[order]))
        i = np.arange(max(np.searchsorted(mass, p), 1), vocab - 1)
        clear = i[(np.diff(away[order])[i] > 5e-5) & (np.diff(mass)[i - 1] > 1e-5)]
        i = clear[0]  # keeps order[: i + 1]
        p = float(np.float32((mass[i] + mass[i - 1]) / 2))
        theirs = transformers.TypicalLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(x[None]))
        ours = np.asarray(filters.typical(x, p))
        assert np.isfinite(ours).sum() == i + 1
        assert np.array_equal(ours, theirs.numpy()[0])
