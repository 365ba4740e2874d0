"""Mutual information from samples, in nats, by three estimators for three kinds of data.

- `discrete_information`, for two lists of labels: from their frequencies, with the Miller-Madow correction. Too high
  while pairs of labels are seen about once each.
- `neighbour_information`, for numbers with numbers or with labels, in few dimensions: from distances to neighbours. Too
  low, more so with more dimensions, more information and fewer samples.
- `probe_information`, for activations of any width with labels: what a linear classifier can use, on samples that it
  was not fitted to. A lower bound.

How much each errs can be seen on data of known information, which `gaussian_pair` and `gaussian_classes` make;
docs/analysis.md shows the result.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlm.analysis import _checks
from jaxlm.errors import InputError
from jaxlm.sample.arguments import check_count

_SPREAD = 1e-10  # of the jitter that separates equal points, relative to their standard deviation


class Probed(NamedTuple):
    """What a linear classifier finds.

    Attributes:
        nats: the estimate.
        standard_error: of its mean over held-out samples, as if those were independent.
        baseline: nats per sample that the labels cost without activations, on the same held-out samples.
        accuracy: share of held-out labels that the classifier ranks first, 0 to 1.
    """

    nats: float
    standard_error: float
    baseline: float
    accuracy: float


def entropy(labels: ArrayLike) -> float:
    """Entropy of labels in nats: that of their frequencies, plus (kinds - 1) / 2N.

    Args:
        labels: whole numbers, truths or texts; of any shape.

    Raises:
        InputError: no label, or labels that are numbers with a fraction: each would be a kind of its own.

    Source: Miller (1955), Note on the bias of information estimates.
    """
    kinds = _checks.labels("labels", labels).ravel()
    counts = np.unique(kinds, return_counts=True)[1].astype(np.float64)
    if not len(counts):
        raise InputError("labels: expected at least one, found none.")
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum() + (len(counts) - 1) / (2 * counts.sum()))


def discrete_information(x: ArrayLike, y: ArrayLike) -> float:
    """I(x; y) = H(x) + H(y) - H(x, y) of two lists of labels, N each; labels and errors as for `entropy`."""
    first, second = (
        np.unique(_checks.labels(name, values).ravel(), return_inverse=True)[1] for name, values in (("x", x), ("y", y))
    )
    _checks.same_length("x", first, "y", second)
    _, pairs = np.unique(np.stack([first, second]), axis=1, return_inverse=True)
    return entropy(first) + entropy(second) - entropy(pairs)


def neighbour_information(x: ArrayLike, y: ArrayLike, *, k: int = 3) -> float:
    """I(x; y) from the distances between neighbours, without any assumption on the shape of the distribution.

    Distances are the largest difference in any coordinate, after each has been scaled to unit deviation. Points that
    coincide are moved apart by 1e-10 deviations, with a fixed seed.

    Args:
        x: float[N] or [N, D].
        y: float[N] or [N, E]; or labels int[N].
        k: neighbours: fewer give less bias and more noise.

    Raises:
        InputError: values that are no finite numbers, other shapes, lengths that differ, or not more than k points;
            with labels, no label with more than k.

    Sources: Kraskov, Stoegbauer and Grassberger (arXiv cond-mat/0305641), eq. 8; for labels Ross (2014), Mutual
    information between discrete and continuous data sets, eq. 2.
    """
    points, labels = _samples("x", x), _samples("y", y)
    _checks.same_length("x", points, "y", labels)
    if not 1 <= _checks.whole("k", k) < len(points):
        raise InputError(f"k: must be at least 1 and below the number of points, {len(points)}, found {k}.")
    if labels.dtype.kind in "iub":
        if labels.ndim > 1:
            raise InputError(
                f"y: expected one label for each sample, found integers of shape {labels.shape}; numbers of several "
                "columns are y.astype(float)."
            )
        return _with_labels(_scaled(points), labels, k)
    from scipy.special import digamma

    points, other = _scaled(points), _scaled(labels)
    radius = _kth_distance(np.concatenate([points, other], axis=1), k)
    near_x, near_y = _within(points, radius), _within(other, radius)
    return float(digamma(k) + digamma(len(points)) - (digamma(near_x) + digamma(near_y)).mean())


def _with_labels(points: NDArray[np.float64], labels: NDArray[np.int64], k: int) -> float:
    from scipy.special import digamma

    radius, size = np.zeros(len(points)), np.zeros(len(points))
    for label in np.unique(labels):
        rows = labels == label
        if rows.sum() > k:
            radius[rows], size[rows] = _kth_distance(points[rows], k), rows.sum()
    used = size > 0
    if not used.any():
        raise InputError(f"k: no label has more than {k} points; choose a smaller k or more points.")
    near = _within(points[used], radius[used])
    return float(digamma(k) + digamma(used.sum()) - (digamma(size[used]) + digamma(near)).mean())


def probe_information(
    activations: ArrayLike, labels: ArrayLike, *, groups: ArrayLike | None = None, seed: int = 0
) -> Probed:
    """How many nats about the labels a linear classifier gets out of activations: a lower bound of I.

    The mean over held-out samples of log q(label | activation) - log p(label): q is a multinomial logistic regression
    on standardised activations, p the labels' frequencies, both fitted to the other three quarters of the samples. A
    thousandth of p is mixed into q, so that no label has probability zero. The result can be below zero where there is
    nothing to find and few samples to learn that from.

    Args:
        activations: [N, D].
        labels: N whole numbers, truths or texts.
        groups: int[N]; samples of one group (one text) are held out together, so that what neighbouring samples share
            is not counted as knowledge. By default every sample is its own group.
        seed: decides which groups are held out.

    Raises:
        InputError: activations of another shape or not finite, labels that are numbers with a fraction, lengths that
            differ, fewer than 4 groups, or a single label.

    Sources: Barber and Agakov (2003), The IM algorithm; Xu et al., A theory of usable information (arXiv 2002.10689).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = _checks.numbers("activations", activations).astype(np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise InputError(
            f"activations: expected [N, D], found shape {rows.shape}; one number a sample is activations[:, None]."
        )
    _, y = np.unique(_checks.labels("labels", labels).ravel(), return_inverse=True)
    owner = np.arange(len(rows)) if groups is None else np.asarray(groups).ravel()
    _checks.same_length("activations", rows, "labels", y)
    _checks.same_length("activations", rows, "groups", owner)
    kinds, owners = int(y.max(initial=-1)) + 1, np.unique(owner)
    _checks.enough("labels", kinds, len(owners))
    held_out = np.random.default_rng(seed).permutation(owners)[: len(owners) // 4]
    test = np.isin(owner, held_out)
    x_train, y_train, x_test, y_test = rows[~test], y[~test], rows[test], y[test]

    frequency = np.bincount(y_train, minlength=kinds) + 0.5  # Krichevsky and Trofimov's estimate
    prior = frequency / frequency.sum()
    posterior = np.zeros((len(y_test), kinds))
    seen = np.unique(y_train)
    if len(seen) > 1:
        scale = StandardScaler().fit(x_train)
        # At a tolerance of 1e-4 the held-out loss is the same to 0.004 nats, for twice the work; 1e-2 is too coarse.
        fitted = LogisticRegression(max_iter=300, tol=3e-3).fit(scale.transform(x_train), y_train)
        posterior[:, fitted.classes_] = fitted.predict_proba(scale.transform(x_test))
    else:
        posterior[:, seen] = 1.0
    mixed = 0.999 * posterior + 0.001 * prior
    each = np.arange(len(y_test))
    gain = np.log(mixed[each, y_test]) - np.log(prior[y_test])
    return Probed(
        nats=float(gain.mean()),
        standard_error=float(gain.std() / math.sqrt(len(gain))),
        baseline=float(-np.log(prior[y_test]).mean()),
        accuracy=float((mixed.argmax(-1) == y_test).mean()),
    )


def gaussian_pair(
    n: int, nats: float, *, dims: int = 1, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Samples x, y float64[n, dims] of a Gaussian with I(x; y) = `nats`, shared equally by the coordinates.

    Each coordinate of y has the correlation r with its own of x, and I = -dims / 2 log(1 - r**2).

    Raises:
        InputError: fewer than one sample or dimension, or negative information.

    Source: Cover and Thomas, Elements of Information Theory, example 8.5.1.
    """
    check_count("n", n)
    check_count("dims", dims)
    _checks.at_least("nats", nats, 0)
    r = math.sqrt(1.0 - math.exp(-2.0 * nats / dims))
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2, n, dims))
    return x, r * x + math.sqrt(1.0 - r * r) * noise


def gaussian_classes(
    n: int, n_classes: int, distance: float, *, dims: int = 8, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    """Samples of `n_classes` equally frequent Gaussians of unit deviation, their labels, and I(points; label) in nats.

    Means lie at random `distance` from the origin. The information is the mean of log p(label | x) + log n_classes
    over 200,000 fresh points, whose standard error is a few thousandths of a nat; the best classifier is linear.

    Returns:
        float64[n, dims], int64[n], nats.

    Raises:
        InputError: fewer than two classes, fewer than one sample or dimension, or a negative distance.
    """
    for name, count, least in (("n", n, 1), ("n_classes", n_classes, 2), ("dims", dims, 1)):
        check_count(name, count, least)
    _checks.at_least("distance", distance, 0)
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(n_classes, dims))
    means *= distance / np.linalg.norm(means, axis=1, keepdims=True)
    fresh = rng.integers(n_classes, size=200_000)
    points = means[fresh] + rng.normal(size=(len(fresh), dims))
    scores = points @ means.T - (means**2).sum(1) / 2  # log-density up to what all classes share
    top = scores.max(1)
    log_total = top + np.log(np.exp(scores - top[:, None]).sum(1))
    nats = float((scores[np.arange(len(fresh)), fresh] - log_total).mean() + math.log(n_classes))
    labels = rng.integers(n_classes, size=n)
    return means[labels] + rng.normal(size=(n, dims)), labels, nats


def _samples(name: str, values: ArrayLike) -> NDArray[Any]:
    found = _checks.numbers(name, values)
    if found.ndim not in (1, 2) or not found.size:
        raise InputError(f"{name}: expected [N] or [N, D] with at least one sample, found shape {found.shape}.")
    return found


def _scaled(values: NDArray[Any]) -> NDArray[np.float64]:
    """[N, D] with unit deviations, and no two points alike."""
    points = values.astype(np.float64).reshape(len(values), -1)
    spread = points.std(0)
    points = (points - points.mean(0)) / np.where(spread > 0, spread, 1.0)
    return points + _SPREAD * np.random.default_rng(0).normal(size=points.shape)


def _kth_distance(points: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Just below the distance to each point's k-th neighbour."""
    from sklearn.neighbors import NearestNeighbors

    found = NearestNeighbors(n_neighbors=k, metric="chebyshev").fit(points).kneighbors()[0]
    return np.nextafter(found[:, -1], 0)


def _within(points: NDArray[np.float64], radius: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many points lie within each point's radius, itself included."""
    from sklearn.neighbors import KDTree

    counts: NDArray[np.int64] = KDTree(points, metric="chebyshev").query_radius(points, radius, count_only=True)
    return counts
