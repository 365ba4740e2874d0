"""Filters and the repetition penalty against transformers' logits processors, on logits without ties.

The two sum in different precisions, so the options that are compared with a sum or a ratio are put half-way between the
values of two neighbouring tokens: then no rounding decides, and one token too many or too few shows.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.sample import filter_logits, penalties

pytestmark = pytest.mark.parity

VOCABS = (1000, 50257)
TEMPERATURES = (0.3, 0.7, 1.0, 1.3, 2.0)
TOP_P = (0.1, 0.5, 0.8, 0.95, 0.99)
MIN_P = (0.001, 0.02, 0.1, 0.5, 0.9)


def distinct_logits(vocab: int, seed: int) -> np.ndarray:
    """float32[5, V], about 3 times normal, no two of a row alike: multiples of 2**-16, which no division ties."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(5):
        grid = np.unique(np.round(rng.normal(size=4 * vocab) * 3 * 2**16))
        rows.append(rng.choice(grid, vocab, replace=False) / 2**16)
    return np.stack(rows).astype(np.float32)


def between_masses(y: np.ndarray, p: float) -> float:
    """A top-p near `p` whose 1 - p lies half-way between the masses of two tails of the row y."""
    prob = np.sort(np.exp(y.astype(np.float64) - y.max()))
    tail = np.cumsum(prob) / prob.sum()
    i = max(np.searchsorted(tail, 1 - p), 1)
    assert tail[i] - tail[i - 1] > 1e-6  # float32 sums are nearer than this
    return float(np.float32(1 - (tail[i - 1] + tail[i]) / 2))


def between_ratios(y: np.ndarray, floor: float) -> float:
    """A min-p near `floor` that lies between the relative probabilities of two tokens of the row y."""
    ratio = np.sort(np.exp(y.astype(np.float64) - y.max()))
    i = np.searchsorted(ratio, floor)
    assert ratio[i] > 1.00001 * ratio[i - 1]
    return float(np.float32(np.sqrt(ratio[i - 1] * ratio[i])))


@pytest.fixture(scope="module")
def warp(torch: Any, transformers: Any):
    """warp(name, option, y) -> what transformers' processor of that name leaves of one row."""

    def one(name: str, option: float, y: np.ndarray) -> np.ndarray:
        ids = torch.zeros(1, 1, dtype=torch.int64)
        return getattr(transformers, f"{name}LogitsWarper")(option)(ids, torch.from_numpy(y[None])).numpy()[0]

    return one


def assert_same(got: Any, expected: list[np.ndarray]) -> None:
    """The same tokens kept in each row, and their logits equal to the last bit."""
    got, wanted = np.asarray(got), np.stack(expected)
    assert np.isfinite(wanted).any(-1).all()
    assert np.array_equal(np.isfinite(got), np.isfinite(wanted))
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("vocab", VOCABS)
def test_temperature(warp, vocab):
    x = distinct_logits(vocab, 0)
    expected = [warp("Temperature", t, row) for t, row in zip(TEMPERATURES, x, strict=True)]
    assert_same(filter_logits(x, temperature=np.float32(TEMPERATURES)), expected)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize(
    "top_k", [(1, 2, 5, 40, 63), (1, 64, 500, 999, 10**6)]
)  # by lax.top_k where V is large; by search
def test_top_k(warp, vocab, top_k):
    x = distinct_logits(vocab, 1)
    expected = [warp("TopK", k, row) for k, row in zip(top_k, x, strict=True)]
    assert [np.isfinite(row).sum() for row in expected] == [min(k, vocab) for k in top_k]
    assert_same(filter_logits(x, top_k=np.array(top_k)), expected)


@pytest.mark.parametrize("vocab", VOCABS)
def test_top_p(warp, vocab):
    x = distinct_logits(vocab, 2)
    top_p = [between_masses(row, p) for p, row in zip(TOP_P, x, strict=True)]
    assert_same(filter_logits(x, top_p=top_p), [warp("TopP", p, row) for p, row in zip(top_p, x, strict=True)])


@pytest.mark.parametrize("vocab", VOCABS)
def test_min_p(warp, vocab):
    x = distinct_logits(vocab, 3)
    min_p = [between_ratios(row, p) for p, row in zip(MIN_P, x, strict=True)]
    assert_same(filter_logits(x, min_p=min_p), [warp("MinP", p, row) for p, row in zip(min_p, x, strict=True)])


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("top_k", [(63, 20, 40, 50, 33), (0, 100, 40, 700, 30)])  # 0: not in the chain
def test_chain(warp, vocab, top_k):
    x = distinct_logits(vocab, 4)
    top_p, min_p, expected = [], [], []
    for i, row in enumerate(x):
        y = warp("Temperature", TEMPERATURES[i], row)
        y = after_k = warp("TopK", top_k[i], y) if top_k[i] else y
        top_p.append(between_masses(y, (0.99, 0.95, 0.9, 0.9, 0.95)[i]))
        y = after_p = warp("TopP", top_p[i], y)
        min_p.append(between_ratios(y, (0.02, 0.15, 0.3, 0.2, 0.3)[i]))
        y = warp("MinP", min_p[i], y)
        kept = [np.isfinite(part).sum() for part in (row, after_k, after_p, y)]
        assert kept[1] > kept[2] > kept[3], kept  # no filter stands idle
        expected.append(y)
    options = {"top_k": np.array(top_k), "top_p": top_p, "min_p": min_p}
    assert_same(filter_logits(x, temperature=np.float32(TEMPERATURES), **options), expected)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty(torch, transformers, penalty):
    x = distinct_logits(1000, 5)
    rng = np.random.default_rng(6)
    histories = [rng.integers(0, 1000, n) for n in (1, 30, 400, 64, 7)]
    histories[4][:] = 17  # the same token again counts once
    padded = np.full((5, 400), -1)
    expected = []
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    for i, (ids, row) in enumerate(zip(histories, x, strict=True)):
        padded[i, : len(ids)] = ids
        expected.append(processor(torch.from_numpy(ids[None]), torch.from_numpy(row[None])).numpy()[0])
        assert (expected[i] != row).sum() == len(set(ids.tolist()))
    assert_same(penalties.repetition(jnp.asarray(x), jnp.asarray(padded), penalty), expected)
