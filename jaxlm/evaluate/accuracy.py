"""Accuracy on questions with one right answer, beside what needs no model at all. Loads no jax.

An answer counts when it equals the expected one exactly after both are normalised by one rule: cut at the first
`<|endoftext|>`, then strip white space at both ends. Case, punctuation and word order count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

END_OF_TEXT = "<|endoftext|>"
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


class TypeAccuracy(TypedDict):
    """How the questions of one type went. Accuracies are fractions of `n`."""

    n: int
    before: float | None  # the pretrained model; None when it was not asked
    after: float | None  # the fine-tuned model; None when there is none
    interval: list[float] | None  # [low, high]: Wilson's 95 % interval of `after`, or of `before` without it
    baselines: dict[str, float]  # accuracy of each trivial strategy
    best_baseline: float | None
    ratio: float | None  # `after` (or `before`) over best_baseline; None without one, or where it is 0


def normalize(text: str, end_of_text: str = END_OF_TEXT) -> str:
    """The part of `text` that is compared: up to the first `end_of_text`, stripped."""
    return text.partition(end_of_text)[0].strip()


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Which predictions equal their answer after `normalize`.

    Raises:
        ValueError: the two differ in length.
    """
    return [normalize(ours) == normalize(theirs) for ours, theirs in zip(predictions, answers, strict=True)]


def fraction_right(matches: Sequence[bool]) -> float | None:
    """The fraction of `matches` that is true; None when there are none."""
    return sum(matches) / len(matches) if matches else None


def wilson_interval(n_right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval of a proportion: sound for small `n` and near 0 and 1, where the normal one is not.

    Args:
        n_right: successes, 0 to n.
        n: trials, above 0.
        z: quantile of the normal distribution; the default gives 95 %.

    Returns:
        (low, high) within [0, 1].

    Raises:
        ValueError: `n` is not positive or `n_right` is outside 0..n.

    References:
        E. B. Wilson (1927), Probable inference, the law of succession, and statistical inference. JASA 22.
    """
    if n <= 0 or not 0 <= n_right <= n:
        raise ValueError(f"expected 0 <= n_right <= n and n > 0, found n_right={n_right}, n={n}")
    p = n_right / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the exact bound is 0 or 1; the arithmetic misses it by a rounding.
    return (0.0 if n_right == 0 else centre - half, 1.0 if n_right == n else centre + half)


def by_type(
    types: Sequence[str],
    *,
    before: Sequence[bool] | None = None,
    after: Sequence[bool] | None = None,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, TypeAccuracy]:
    """The table of accuracies by question type, sorted by type.

    Args:
        types: the type of each question.
        before: whether the pretrained model was right, one per question.
        after: the same for the fine-tuned model.
        baselines: type -> strategy -> accuracy, as `jaxlm.data.storyworld.baselines` gives it.

    Raises:
        ValueError: neither `before` nor `after`, or lengths that differ.
    """
    measured = after if after is not None else before
    if measured is None:
        raise ValueError("by_type needs the matches before or after fine-tuning")
    for matches in (before, after):
        if matches is not None and len(matches) != len(types):
            raise ValueError(f"{len(matches)} matches for {len(types)} questions")
    table: dict[str, TypeAccuracy] = {}
    for kind in sorted(set(types)):
        rows = [row for row, own in enumerate(types) if own == kind]
        n_right = sum(measured[row] for row in rows)
        trivial = dict((baselines or {}).get(kind, {}))
        best = max(trivial.values(), default=None)
        table[kind] = TypeAccuracy(
            n=len(rows),
            before=fraction_right([before[row] for row in rows]) if before is not None else None,
            after=fraction_right([after[row] for row in rows]) if after is not None else None,
            interval=list(wilson_interval(n_right, len(rows))),
            baselines=trivial,
            best_baseline=best,
            ratio=n_right / len(rows) / best if best else None,
        )
    return table
