"""Principal components of activations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlm.analysis import _checks
from jaxlm.errors import InputError


class Projection(NamedTuple):
    """Points seen along the directions in which they differ most.

    Attributes:
        points: float64[N, C].
        explained: float64[C], the share of the variance along each direction, largest first.
        components: float64[C, D], the directions, of length 1 and at right angles.
        mean: float64[D], subtracted before.
    """

    points: NDArray[np.float64]
    explained: NDArray[np.float64]
    components: NDArray[np.float64]
    mean: NDArray[np.float64]

    def project(self, activations: ArrayLike) -> NDArray[np.float64]:
        """Other activations [..., D] seen along the same directions, float64[N, C].

        Raises:
            InputError: activations of another width, or a number that is not finite.
        """
        rows = _rows(activations)
        if rows.shape[1] != len(self.mean):
            raise InputError(f"activations: expected {len(self.mean)} numbers a point, found {rows.shape[1]}.")
        return (rows - self.mean) @ self.components.T


def pca(activations: ArrayLike, n_components: int = 2) -> Projection:
    """Principal component analysis by scikit-learn, from a full decomposition: the same input gives the same picture.

    Args:
        activations: [..., D]; every place before the last axis is a point.
        n_components: C.

    Raises:
        InputError: fewer points or dimensions than components, points that are all the same, or what is no finite
            real number.

    Source: Pearson, On lines and planes of closest fit (1901).
    """
    from sklearn.decomposition import PCA

    rows = _rows(activations)
    if not 1 <= _checks.whole("n_components", n_components) <= min(rows.shape):
        raise InputError(
            f"n_components: must be between 1 and the smaller of points and dimensions, {min(rows.shape)}, found "
            f"{n_components}."
        )
    if not np.ptp(rows, axis=0).any():
        raise InputError(
            f"activations: all {len(rows)} points are the same, so they differ in no direction; give others."
        )
    fitted = PCA(n_components, svd_solver="full").fit(rows)
    return Projection(fitted.transform(rows), fitted.explained_variance_ratio_, fitted.components_, fitted.mean_)


def _rows(activations: ArrayLike) -> NDArray[np.float64]:
    values = _checks.real("activations", activations).astype(np.float64)
    if not values.ndim or not values.size:
        raise InputError(f"activations: expected [..., D] with at least one point, found shape {values.shape}.")
    rows = values.reshape(-1, values.shape[-1])
    if not np.isfinite(rows).all():
        raise InputError(
            f"activations: found {int((~np.isfinite(rows)).sum())} numbers that are NaN or infinite; look at "
            "earlier layers for where they begin."
        )
    return rows
