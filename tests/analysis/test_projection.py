from __future__ import annotations

import numpy as np
import pytest

from jaxlm import analysis
from jaxlm.errors import InputError

pytest.importorskip("sklearn", reason="needs the extra `analysis`")


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """float64[4, 25, 6], stretched differently in every direction."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(4, 25, 6)) * [5, 3, 2, 1, 0.5, 0.1] @ np.linalg.qr(rng.normal(size=(6, 6)))[0] + 7


def test_components_are_the_eigenvectors_of_the_covariance(points):
    found = analysis.pca(points, 3)
    rows = points.reshape(100, 6)
    values, vectors = np.linalg.eigh(np.cov(rows.T))  # Jolliffe, Principal Component Analysis, chapter 1
    np.testing.assert_allclose(found.explained, values[::-1][:3] / values.sum(), rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(found.components * vectors.T[::-1][:3], axis=1)), 1, rtol=1e-10)
    np.testing.assert_allclose(found.points, (rows - rows.mean(0)) @ found.components.T, atol=1e-10)


def test_the_same_directions_serve_other_points(points):
    found = analysis.pca(points, 2)
    np.testing.assert_allclose(found.project(points), found.points, atol=1e-10)
    np.testing.assert_allclose(found.project(found.mean + 2 * found.components[1]), [[0, 2]], atol=1e-10)


def test_the_same_input_gives_the_same_picture(points):
    np.testing.assert_array_equal(analysis.pca(points).points, analysis.pca(points).points)


@pytest.mark.parametrize("n", [0, 7])
def test_components_that_cannot_be(points, n):
    with pytest.raises(InputError, match=f"smaller of points and dimensions, 6, found {n}"):
        analysis.pca(points, n)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.project(np.ones((3, 5))), "activations: expected 6 numbers a point, found 5"),
        (lambda found: analysis.pca(np.full((4, 3), 0.1)), "activations: all 4 points are the same"),
        (lambda found: analysis.pca(np.zeros((0, 3))), r"at least one point, found shape \(0, 3\)"),
        (lambda found: analysis.pca(np.eye(3), 1.5), "n_components: must be an integer, found 1.5"),
        (lambda found: analysis.pca([[1, 2], [1]]), "activations: expected an array of numbers"),
        (lambda found: analysis.pca(np.eye(3) * 1j), "activations: expected an array of numbers"),
        (lambda found: analysis.pca(1.0), r"found shape \(\)"),
    ],
)
def test_points_that_cannot_be_seen(points, call, message):
    with pytest.raises(InputError, match=message):
        call(analysis.pca(points))


def test_a_nan_is_counted_and_named(points):
    bad = points.copy()
    bad[0, :2, 3] = np.nan
    with pytest.raises(InputError, match="found 2 numbers that are NaN"):
        analysis.pca(bad)
