"""Estimators against information known from formulas, from integrals, and from scikit-learn's own."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxlm import analysis
from jaxlm.errors import InputError

sklearn = pytest.importorskip("sklearn", reason="needs the extra `analysis`")


def test_entropy_by_hand():
    assert analysis.entropy([0, 1, 2, 3]) == pytest.approx(math.log(4) + 3 / 8)
    assert analysis.entropy([5] * 10) == 0
    many = np.repeat([0, 1], [3000, 1000])
    assert analysis.entropy(many) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + 1 / 8000)


def test_labels_may_be_truths_or_texts():
    truths = np.array([True, False, False, True])
    texts = np.where(truths, "yes", "no")
    for labels in (truths, texts, texts.astype(object), truths.astype(np.uint64)):
        assert analysis.entropy(labels) == analysis.entropy([1, 0, 0, 1])
        assert analysis.discrete_information(labels, [5, -1, -1, 5]) == analysis.discrete_information(texts, truths)


def test_information_of_a_noisy_channel():
    """Cover and Thomas, section 7.1.4: a fair bit that arrives wrong with probability 0.1 carries log 2 - H(0.1)."""
    rng = np.random.default_rng(0)
    sent = rng.integers(2, size=20_000)
    got = sent ^ (rng.random(20_000) < 0.1)
    exact = math.log(2) + 0.1 * math.log(0.1) + 0.9 * math.log(0.9)
    assert analysis.discrete_information(sent, got) == pytest.approx(exact, rel=0.05)
    assert analysis.discrete_information(sent, sent) == pytest.approx(math.log(2), rel=1e-3)


def test_the_correction_removes_most_of_the_bias_of_frequencies():
    """Independent labels share nothing; frequencies alone say (kinds - 1)**2 / 2N = 0.11 nats here (Miller 1955)."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(16, size=(2, 1000))
    assert abs(analysis.discrete_information(x, y)) < 0.03


@pytest.mark.parametrize(
    ("nats", "n", "dims"),
    [
        *((nats, 20_000, dims) for nats in (1.0, 4.0) for dims in (1, 2, 3)),
        *((0.25, 100_000, dims) for dims in (1, 2)),
        pytest.param(0.25, 100_000, 3, marks=pytest.mark.slow),
    ],
)
def test_neighbours_are_within_five_percent_on_gaussians(nats, n, dims):
    """I = -dims / 2 log(1 - r**2), Cover and Thomas, example 8.5.1; each from one sample.

    As many points as let every one of 20 seeds (of 8 from a nat on) pass: 40,000 at a quarter nat miss now and then.
    """
    x, y = analysis.gaussian_pair(n, nats, dims=dims)
    assert analysis.neighbour_information(x, y) == pytest.approx(nats, rel=0.05)


def test_neighbours_scatter_little_more_than_they_must():
    """No unbiased estimator of I scatters by less than r / sqrt(N) nats: the Cramer-Rao bound of the correlation,
    (1 - r**2) / sqrt(N), times dI/dr = r / (1 - r**2). At 4,000 samples that alone is 4 % of a quarter of a nat."""
    nats, n = 0.25, 4000
    found = [analysis.neighbour_information(*analysis.gaussian_pair(n, nats, seed=seed)) for seed in range(24)]
    least = math.sqrt(1 - math.exp(-2 * nats)) / math.sqrt(n)
    assert least == pytest.approx(0.04 * nats, rel=0.02)
    assert np.mean(found) == pytest.approx(nats, rel=0.05)
    assert least / 1.5 < np.std(found) < 2 * least


def test_the_gaussian_pair_has_the_correlation_that_it_should():
    x, y = analysis.gaussian_pair(100_000, 1.5, dims=3)
    r = np.mean([np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(3)])
    assert -3 / 2 * math.log(1 - r * r) == pytest.approx(1.5, abs=0.02)
    assert x.std() == pytest.approx(1, abs=0.01)
    assert y.std() == pytest.approx(1, abs=0.01)


def test_neighbours_err_downwards_in_many_dimensions():
    """The bias that the documentation states."""
    x, y = analysis.gaussian_pair(1500, 2.0, dims=12)
    assert 0.3 < analysis.neighbour_information(x, y) < 1.6


def test_independent_numbers_share_nothing():
    x, y = np.random.default_rng(0).normal(size=(2, 4000))
    assert abs(analysis.neighbour_information(x, y)) < 0.03


def test_neighbours_do_not_care_about_scale():
    x, y = analysis.gaussian_pair(1000, 1.0, dims=2)
    expected = analysis.neighbour_information(x, y)
    assert analysis.neighbour_information(1e6 * x + 3, y * [1, -100]) == pytest.approx(expected, abs=1e-3)


def test_neighbours_agree_with_scikit_learn_in_one_dimension():
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

    x, y = analysis.gaussian_pair(800, 0.7)
    peer = mutual_info_regression(x, y[:, 0], n_neighbors=3, random_state=0)[0]
    assert analysis.neighbour_information(x, y) == pytest.approx(peer, abs=1e-6)
    labels = (y[:, 0] > 0.3).astype(int)
    peer = mutual_info_classif(x, labels, n_neighbors=5, random_state=0)[0]
    assert analysis.neighbour_information(x, labels, k=5) == pytest.approx(peer, abs=1e-6)


def test_equal_points_are_no_stumbling_block():
    x = np.repeat(np.arange(40.0), 25)
    assert np.isfinite(analysis.neighbour_information(x, x))


def test_the_truth_about_two_gaussian_classes_is_the_integral():
    from scipy.integrate import quad

    def normal(x: float, mean: float) -> float:
        return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

    rng = np.random.default_rng(3)
    means = rng.normal(size=(2, 1))
    means *= 1.2 / np.abs(means)
    if means[0] == means[1]:
        pytest.fail("choose a seed that puts the two means on two sides")

    def integrand(x: float) -> float:
        p, q = normal(x, 1.2), normal(x, -1.2)
        return sum(0.5 * d * math.log(2 * d / (p + q)) for d in (p, q))

    exact = quad(integrand, -12, 12)[0]
    assert analysis.gaussian_classes(10, 2, 1.2, dims=1, seed=3)[2] == pytest.approx(exact, abs=0.004)


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0])
def test_the_probe_is_within_five_percent_on_gaussian_classes(distance):
    points, labels, nats = analysis.gaussian_classes(20_000, 8, distance)
    found = analysis.probe_information(points, labels)
    assert found.nats == pytest.approx(nats, rel=0.05)
    assert abs(found.nats - nats) < 4 * found.standard_error + 0.01
    assert found.baseline == pytest.approx(math.log(8), rel=0.01)


def test_neighbours_with_labels_on_gaussian_classes():
    points, labels, nats = analysis.gaussian_classes(4000, 3, 2.0, dims=2)
    assert analysis.neighbour_information(points, labels) == pytest.approx(nats, rel=0.05)


def test_the_probe_finds_nothing_where_nothing_is():
    rng = np.random.default_rng(0)
    found = analysis.probe_information(rng.normal(size=(3000, 8)), rng.integers(4, size=3000))
    assert -0.03 < found.nats < 0.01
    assert found.accuracy == pytest.approx(0.25, abs=0.05)


def test_the_probe_reads_what_is_there():
    """One-hot vectors tell all of a uniform label: log 5 nats."""
    labels = np.random.default_rng(0).integers(5, size=2000)
    found = analysis.probe_information(np.eye(5)[labels], labels)
    assert found.nats == pytest.approx(math.log(5), rel=0.01)
    assert found.accuracy == 1.0


def test_groups_are_held_out_whole():
    """Each group has a mark of its own and one label: sample by sample the mark gives the label away, group by group
    it tells nothing."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 20)
    labels = rng.integers(3, size=60)[groups]
    marks = np.eye(60)[groups]
    assert analysis.probe_information(marks, labels).nats > 0.8
    assert analysis.probe_information(marks, labels, groups=groups).nats < 0.05


def test_a_label_that_only_the_held_out_samples_have_costs_a_finite_amount():
    labels = np.r_[np.zeros(40, int), np.ones(40, int), [2]]
    for seed in range(8):
        assert np.isfinite(analysis.probe_information(np.eye(3)[labels], labels, seed=seed).nats)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.entropy([]), "at least one"),
        (lambda: analysis.discrete_information([1, 2], [1]), "x and y: .* found 2 and 1"),
        (lambda: analysis.neighbour_information(np.zeros(3), np.zeros(4)), "x and y: .* found 3 and 4"),
        (lambda: analysis.neighbour_information(np.arange(3.0), np.arange(3.0), k=3), "below the number of points, 3"),
        (lambda: analysis.neighbour_information(np.arange(5.0), np.arange(5), k=2), "no label has more than 2 points"),
        (
            lambda: analysis.neighbour_information([0.0, np.nan, 1, 2, 3], np.arange(5.0)),
            "x: .* found NaN or .* 1 times",
        ),
        (
            lambda: analysis.neighbour_information(np.arange(5.0), [0.0, 1, 2, 3, np.inf]),
            "y: .* found NaN or .* 1 times",
        ),
        (lambda: analysis.neighbour_information(np.arange(5.0), list("aabbb")), "y: .* give labels as integers"),
        (lambda: analysis.gaussian_pair(100, -1.0), r"nats: must be at least 0, found -1\.0"),
        (lambda: analysis.gaussian_pair(100, 1.0, dims=0), "dims: must be at least 1, found 0"),
        (lambda: analysis.gaussian_pair(-1, 1.0), "n: must be at least 1, found -1"),
        (lambda: analysis.gaussian_classes(100, 1, 1.0), "n_classes: must be at least 2, found 1"),
        (lambda: analysis.gaussian_classes(100, 2, math.nan), "distance: must be at least 0, found nan"),
        (lambda: analysis.probe_information(np.ones((9, 2)), np.zeros(9, int)), "labels: .* found 1 in 9"),
        (lambda: analysis.probe_information(np.ones((9, 2)), np.arange(9), groups=np.zeros(9)), "found 9 in 1"),
        (lambda: analysis.probe_information(np.ones((9, 2)), np.arange(8)), "activations and labels: .* 9 and 8"),
        (
            lambda: analysis.probe_information(np.ones((9, 2)), np.arange(9), groups=np.arange(7)),
            "activations and groups: .* found 9 and 7",
        ),
        (lambda: analysis.entropy([0.1, 0.2]), "labels: expected whole .* found float64; .* neighbour_information"),
        (lambda: analysis.discrete_information([1, 2], [0.5, 1.0]), "y: expected whole .* neighbour_information"),
        (lambda: analysis.discrete_information([[1], [1, 2]], [1, 2]), "x: .* rows of several lengths"),
        (
            lambda: analysis.probe_information(np.ones((9, 2)), np.arange(9.0)),
            "labels: expected whole .* found float64",
        ),
        (lambda: analysis.probe_information(np.ones(9), np.arange(9)), r"activations: expected \[N, D\], .* \(9,\)"),
        (lambda: analysis.probe_information([[np.nan]] * 9, np.arange(9)), "activations: .* found NaN or .* 9 times"),
        (lambda: analysis.probe_information([[np.inf]] * 9, np.arange(9)), "activations: .* found NaN or .* 9 times"),
        (lambda: analysis.neighbour_information([], []), r"x: expected \[N\] or \[N, D\] .* \(0,\)"),
        (lambda: analysis.neighbour_information(np.arange(5.0), 1.0), r"y: expected \[N\] .* found shape \(\)"),
        (
            lambda: analysis.neighbour_information(np.ones(5), np.ones((5, 2), int)),
            r"y: .* \(5, 2\); .*astype\(float\)",
        ),
        (
            lambda: analysis.neighbour_information(np.ones(5), np.ones(5), k=2.5),
            "k: must be an integer, found 2.5",
        ),
        (lambda: analysis.gaussian_pair(9.5, 1.0), "n: must be an integer, found 9.5"),
        (lambda: analysis.gaussian_classes(9, 2.5, 1.0), "n_classes: must be an integer, found 2.5"),
        (lambda: analysis.neighbour_information(np.ones(5), np.ones(5) * 1j), "y: expected an array of numbers"),
    ],
)
def test_samples_that_cannot_be_used(call, message):
    with pytest.raises(InputError, match=message):
        call()
