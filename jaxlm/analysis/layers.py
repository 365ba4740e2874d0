"""What each layer knows of the tokens around it: mutual information of activations with any label of their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlm.analysis import _checks
from jaxlm.analysis.capture import capture, select
from jaxlm.analysis.information import probe_information
from jaxlm.analysis.lens import LAYERS
from jaxlm.config import ModelConfig
from jaxlm.errors import InputError
from jaxlm.model import Params
from jaxlm.sample.arguments import check_count


class LayerInformation(NamedTuple):
    """Information of each named activation with each kind of label, by `probe_information`.

    Attributes:
        names: the activations, in the model's order.
        nats: label's name -> float64[len(names)].
        standard_error: label's name -> float64[len(names)], nats.
        entropy: label's name -> nats that the label costs without activations: what the information cannot exceed.
    """

    names: tuple[str, ...]
    nats: dict[str, NDArray[np.float64]]
    standard_error: dict[str, NDArray[np.float64]]
    entropy: dict[str, float]


def token_labels(tokens: ArrayLike, offsets: Mapping[str, int] | None = None) -> dict[str, NDArray[np.int64]]:
    """Labels int64[B, T] that are tokens of the same row, -1 where the row has none there.

    Args:
        tokens: int[B, T].
        offsets: label's name -> how many places on, 0 the place itself, negative before it. By default the input
            token, 0, and the next one, 1.

    Raises:
        InputError: tokens of another shape or type, or offsets that are no dict of whole numbers.
    """
    ids = _checks.tokens(tokens, np.asarray).astype(np.int64)
    offsets = {"input": 0, "next": 1} if offsets is None else offsets
    _checks.mapping("offsets", offsets, "whole numbers")
    length = ids.shape[1]
    out: dict[str, NDArray[np.int64]] = {}
    for name, places in offsets.items():
        offset = _checks.whole(f"offsets[{name!r}]", places)
        shifted = np.full_like(ids, -1)
        first, last = max(0, -offset), min(length, length - offset)
        if last > first:
            shifted[:, first:last] = ids[:, first + offset : last + offset]
        out[name] = shifted
    return out


def information_by_layer(
    cfg: ModelConfig,
    params: Params,
    tokens: ArrayLike,
    *,
    labels: Mapping[str, ArrayLike] | None = None,
    names: str | Sequence[str] = LAYERS,
    positions: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    max_samples: int = 4000,
    seed: int = 0,
) -> LayerInformation:
    """How much the activations at each place tell a linear classifier about its labels.

    Texts, the rows of `tokens`, are held out whole. All activations are judged on the same places.

    Args:
        cfg: the model.
        params: its parameters.
        tokens: int32[B, T]; at least 4 rows.
        labels: name -> [B, T], whole numbers, -1 where a place has no such label, or truths, or texts, "" where it has
            none; by default those of `token_labels`.
        names: activations of shape [B, T, ...], as for `capture`; by default the residual stream.
        positions: as for `jaxlm.forward`.
        segment_ids: as for `jaxlm.forward`.
        max_samples: places used, drawn at random where there are more.
        seed: decides which places are used, and which rows are held out.

    Raises:
        InputError: tokens that the model does not have, an unknown name or none, an activation that is not by place or
            not finite, labels of another shape or type or at no place, or what `capture` or `probe_information`
            refuses.
    """
    wanted = select(cfg, names)
    ids = _checks.tokens(tokens, np.asarray)
    _checks.in_vocabulary(cfg, ids)
    ids = ids.astype(np.int32)
    check_count("max_samples", max_samples)
    labels = token_labels(ids) if labels is None else labels
    _checks.mapping("labels", labels, "arrays [B, T]")
    if not wanted:
        raise InputError("names: expected at least one, found none; analysis.names(cfg) lists all.")
    positions = _checks.by_token("positions", positions, ids.shape)
    segment_ids = _checks.by_token("segment_ids", segment_ids, ids.shape)
    run = jax.jit(capture, static_argnames="names")
    seen = run(cfg, params, ids, names=wanted, positions=positions, segment_ids=segment_ids)
    activations = {name: np.asarray(seen[name].astype("float32")) for name in wanted}
    for name, value in activations.items():
        if value.shape[:2] != ids.shape:
            raise InputError(
                f"names: {name} has shape {value.shape}, which is not by row and place {ids.shape}; choose another, "
                "such as blocks.*.out."
            )
        if not np.isfinite(value).all():
            raise InputError(
                f"params: {name} has NaN or infinite numbers; look at earlier layers for where they begin."
            )
    nats: dict[str, NDArray[np.float64]] = {}
    errors: dict[str, NDArray[np.float64]] = {}
    entropies: dict[str, float] = {}
    for kind, values in labels.items():
        label = _checks.labels(f"labels[{kind!r}]", values)
        if label.shape != ids.shape:
            raise InputError(f"labels[{kind!r}]: expected one for each token, shape {ids.shape}, found {label.shape}.")
        has_one = label != "" if label.dtype.kind == "U" else label >= 0
        places = np.flatnonzero(has_one)
        if not len(places):
            raise InputError(f"labels[{kind!r}]: expected a label at some place, found none; leave this kind out.")
        if len(places) > max_samples:
            places = np.sort(np.random.default_rng(seed).choice(places, max_samples, replace=False))
        rows, columns = np.unravel_index(places, ids.shape)
        chosen = label[rows, columns]
        _checks.enough(f"labels[{kind!r}]", len(np.unique(chosen)), len(np.unique(rows)))
        found = [
            probe_information(value[rows, columns].reshape(len(places), -1), chosen, groups=rows, seed=seed)
            for value in activations.values()
        ]
        nats[kind] = np.array([one.nats for one in found])
        errors[kind] = np.array([one.standard_error for one in found])
        entropies[kind] = found[0].baseline
    return LayerInformation(wanted, nats, errors, entropies)
