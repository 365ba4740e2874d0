"""Whether probabilities mean what they say: of all predictions given 70 %, do 70 % come true?"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlm.analysis import _checks
from jaxlm.errors import InputError
from jaxlm.sample.arguments import check_count


class Calibration(NamedTuple):
    """Predictions in bins of like probability.

    Attributes:
        predicted: float64[bins], mean probability of each bin that holds a prediction.
        observed: float64[bins], the share that came true.
        counts: int64[bins], predictions in each.
        error: the expected calibration error: |predicted - observed| averaged over predictions, 0 to 1.
        error_if_calibrated: what chance alone gives a calibrated model with these probabilities and this many
            predictions. An `error` near it is no evidence of anything.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    counts: NDArray[np.int64]
    error: float
    error_if_calibrated: float


def calibration(
    log_probs: ArrayLike,
    targets: ArrayLike,
    *,
    which: Literal["top", "all"] = "top",
    mask: ArrayLike | None = None,
    n_bins: int = 15,
    bins: Literal["width", "mass"] = "width",
) -> Calibration:
    """Reliability of next-token probabilities.

    Args:
        log_probs: [..., V], log-probabilities, or logits: they are normalised here.
        targets: int[...], the tokens that came next, 0 to V - 1; where the mask is zero, anything.
        which: `top`, only each place's likeliest token; `all`, the probability of every token at every place.
        mask: [...], non-zero where a place counts; by default everywhere.
        n_bins: at most so many.
        bins: of equal `width` in probability, or of equal `mass`, as many predictions in each.

    Raises:
        InputError: shapes that do not go together, no place that counts, a target there that is no token, a NaN, no
            bin, or another `which` or `bins`.

    Source: Guo et al., On calibration of modern neural networks (arXiv 1706.04599), section 2.
    """
    if which not in ("top", "all"):
        raise InputError(f"which: must be 'top' or 'all', found {which!r}.")
    logits = _checks.real("log_probs", log_probs).astype(np.float64)
    wanted = _checks.real("targets", targets)
    if not logits.ndim or logits.shape[:-1] != wanted.shape:
        raise InputError(
            f"targets: expected one for each row of log_probs, shape {logits.shape[:-1]}, found {wanted.shape}."
        )
    if wanted.size and wanted.dtype.kind not in "iu":
        raise InputError(f"targets: expected token ids, whole numbers, found {wanted.dtype}.")
    judged = np.ones(wanted.shape, bool) if mask is None else _checks.real("mask", mask) != 0
    if judged.shape != wanted.shape:
        raise InputError(f"mask: expected one for each target, shape {wanted.shape}, found {judged.shape}.")
    logits, wanted = logits[judged], wanted[judged]
    vocabulary = logits.shape[-1]
    if len(other := wanted[(wanted < 0) | (wanted >= vocabulary)]):
        raise InputError(
            f"targets: expected tokens from 0 to {vocabulary - 1}, found {len(other)} others, the first {other[0]}; "
            "leave these places out with mask=."
        )
    shifted = np.exp(logits - logits.max(-1, keepdims=True, initial=-math.inf))
    probs = shifted / shifted.sum(-1, keepdims=True)
    if which == "top":
        best = probs.argmax(-1)
        return reliability(probs.max(-1, initial=0.0), best == wanted, n_bins=n_bins, bins=bins)
    came = np.zeros(probs.shape, bool)
    np.put_along_axis(came, wanted[:, None], True, axis=-1)
    return reliability(probs.ravel(), came.ravel(), n_bins=n_bins, bins=bins)


def reliability(
    predicted: ArrayLike, came_true: ArrayLike, *, n_bins: int = 15, bins: Literal["width", "mass"] = "width"
) -> Calibration:
    """Reliability of any yes-or-no predictions.

    `error_if_calibrated` is the sum over bins of E|sum of (outcome - p)| / N. For independent outcomes that sum is
    near normal with variance sum of p (1 - p), and the mean size of a normal number is its deviation times
    sqrt(2 / pi).

    Args:
        predicted: [N], probabilities.
        came_true: bool[N], or zeros and ones.
        n_bins: as for `calibration`.
        bins: as for `calibration`.

    Raises:
        InputError: as for `calibration`, or an outcome that is neither true nor false.
    """
    p = _checks.real("predicted", predicted).astype(np.float64).ravel()
    outcomes = _checks.real("came_true", came_true).ravel()
    hit = outcomes == 1
    if (neither := outcomes[~hit & (outcomes != 0)]).size:
        raise InputError(f"came_true: expected truths, or zeros and ones, found {neither[0]}.")
    if not len(p) or len(p) != len(hit):
        raise InputError(
            f"predictions: expected at least one, and an outcome for each, found {len(p)} and {len(hit)} outcomes."
        )
    if not ((p >= 0) & (p <= 1 + 1e-9)).all():
        raise InputError("predictions: probabilities must be between 0 and 1, found others or NaN.")
    check_count("n_bins", n_bins)
    if bins not in ("width", "mass"):
        raise InputError(f"bins: must be 'width' or 'mass', found {bins!r}.")
    if bins == "width":
        place = np.minimum((p * n_bins).astype(np.int64), n_bins - 1)
    else:
        place = np.empty(len(p), np.int64)
        place[np.argsort(p, kind="stable")] = np.arange(len(p)) * n_bins // len(p)
    count = np.bincount(place, minlength=n_bins)
    used = count > 0
    total_p, total_hit, variance = (
        np.bincount(place, weights=values, minlength=n_bins)[used] for values in (p, hit, p * (1 - p))
    )
    count = count[used]
    return Calibration(
        predicted=total_p / count,
        observed=total_hit / count,
        counts=count,
        error=float(np.abs(total_p - total_hit).sum() / len(p)),
        error_if_calibrated=float(np.sqrt(np.maximum(variance, 0) * 2 / math.pi).sum() / len(p)),
    )
