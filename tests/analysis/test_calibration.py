from __future__ import annotations

import numpy as np
import pytest

from jaxlm import analysis
from jaxlm.errors import InputError


def test_the_error_by_hand():
    """Two bins: at 0.6 half came true, at 0.9 all: (2 x 0.1 + 2 x 0.1) / 4 (Guo et al., arXiv 1706.04599, eq. 3)."""
    found = analysis.reliability([0.6, 0.6, 0.9, 0.9], [True, False, True, True], n_bins=10)
    assert found.error == pytest.approx(0.1)
    np.testing.assert_allclose(found.predicted, [0.6, 0.9])
    np.testing.assert_allclose(found.observed, [0.5, 1.0])
    assert found.counts.tolist() == [2, 2]


def test_bins_of_equal_mass():
    p = np.array([0.9, 0.1, 0.2, 0.95, 0.91, 0.3])
    found = analysis.reliability(p, p > 0.5, n_bins=3, bins="mass")
    assert found.counts.tolist() == [2, 2, 2]
    np.testing.assert_allclose(found.predicted, [0.15, 0.6, 0.93])


def test_chance_alone_gives_the_error_that_is_expected():
    """Outcomes drawn from the predictions themselves, by numpy, many times."""
    rng = np.random.default_rng(0)
    p = rng.beta(2, 1, size=2000)
    drawn = [analysis.reliability(p, rng.random(2000) < p) for _ in range(200)]
    expected = drawn[0].error_if_calibrated
    assert np.mean([one.error for one in drawn]) == pytest.approx(expected, rel=0.05)
    overconfident = analysis.reliability(p, rng.random(2000) < p**2)
    assert overconfident.error > 4 * expected


def test_next_token_probabilities_likeliest_only_or_all():
    probs = np.array([[0.75, 0.2, 0.05], [0.3, 0.65, 0.05]])
    targets = np.array([0, 2])
    top = analysis.calibration(np.log(probs), targets, n_bins=10)
    assert sorted(top.predicted) == pytest.approx([0.65, 0.75])
    assert top.error == pytest.approx((0.25 + 0.65) / 2)
    every = analysis.calibration(np.log(probs), targets, which="all", n_bins=1)
    assert every.counts.tolist() == [6]
    assert every.predicted[0] == pytest.approx(1 / 3)
    assert every.observed[0] == pytest.approx(1 / 3)


def test_logits_are_normalised_and_masked_places_do_not_count():
    logits = np.array([[[3.0, 1.0], [50.0, -np.inf]]])
    found = analysis.calibration(logits, [[0, 1]], mask=[[1, 0]])
    assert found.counts.sum() == 1
    assert found.predicted[0] == pytest.approx(1 / (1 + np.exp(-2)))


@pytest.mark.parametrize("which", ["top", "all"])
def test_a_masked_place_may_have_no_target(which):
    logits = np.array([[3.0, 1.0], [0.0, 0.0]])
    found = analysis.calibration(logits, [0, -1], which=which, mask=[1, 0])
    np.testing.assert_array_equal(found.observed, analysis.calibration(logits[:1], [0], which=which).observed)


def test_a_certain_prediction_is_in_the_last_bin():
    found = analysis.reliability([1.0, 1.0], [True, True])
    assert found.error == 0
    assert found.error_if_calibrated == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: analysis.calibration(np.zeros((3, 4)), [1, 2]), r"shape \(3,\), found \(2,\)"),
        (lambda: analysis.calibration(np.zeros((2, 4)), [1, 2], mask=[0, 0]), "at least one"),
        (lambda: analysis.calibration(np.zeros((2, 4)), [1, 2], which="x"), "which: must be 'top' or 'all', found 'x'"),
        (
            lambda: analysis.calibration(np.zeros((2, 4)), [1, 2], bins="x"),
            "bins: must be 'width' or 'mass', found 'x'",
        ),
        (lambda: analysis.calibration(np.zeros((2, 4)), [1, 2], mask=[1]), r"mask: .* \(2,\), found \(1,\)"),
        (lambda: analysis.calibration(np.zeros((2, 4)), [1.0, 2.0]), "targets: expected token ids, .* found float64"),
        (lambda: analysis.calibration(np.zeros((2, 4)), [1, 4]), "targets: .* 0 to 3, found 1 others, the first 4"),
        (
            lambda: analysis.calibration(np.zeros((2, 4)), [-1, 1], which="all"),
            "1 others, the first -1; .* mask=",
        ),
        (lambda: analysis.calibration(0.0, 0), r"targets: .* found \(\)"),
        (lambda: analysis.reliability([0.5], []), "found 1 and 0"),
        (lambda: analysis.reliability([1.5], [True]), "between 0 and 1"),
        (lambda: analysis.reliability([np.nan], [True]), "NaN"),
        (lambda: analysis.reliability([0.5], [True], n_bins=0), "n_bins: must be at least 1, found 0"),
        (lambda: analysis.reliability([0.5], [True], n_bins=2.5), "n_bins: must be an integer, found 2.5"),
        (lambda: analysis.reliability([0.5, 0.5], [1, 0.3]), "came_true: expected truths, .* found 0.3"),
        (lambda: analysis.reliability([0.5, 0.5], [0, np.nan]), "came_true: expected truths, .* found nan"),
        (lambda: analysis.calibration([[0.5, 0.5], [1.0]], [0, 1]), "log_probs: expected an array of numbers"),
        (lambda: analysis.calibration(["a"], 0), "log_probs: expected an array of numbers"),
    ],
)
def test_predictions_that_cannot_be_judged(call, message):
    with pytest.raises(InputError, match=message):
        call()
