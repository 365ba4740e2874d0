"""An interpolated n-gram model, the baseline that knows only the last few tokens: Kneser-Ney smoothing.

Kneser and Ney, "Improved backing-off for m-gram language modeling" (ICASSP 1995), in the interpolated form of Chen and
Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 2.7: the longest context
counts occurrences, shorter ones count the different tokens seen before them, and each order takes one absolute discount
D from every count and hands it to the next shorter context,

    p(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) p(w | h'),    D = n1 / (n1 + 2 n2),

where N(h) is the number of different tokens after h, n1 and n2 the number of (h, w) counted once and twice, and the
shortest context backs off to the uniform distribution over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxlm.errors import InputError

_Ids = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """The counts of one context length: `keys` are the (context, token) pairs, sorted; contexts are numbered.

    keys: int64[n] = context * (vocab_size + 1) + token. counts: float64[n]. total, kinds: float64[contexts], the sum of
    the counts after each context and the number of different tokens. discount: D.
    """

    keys: _Ids
    counts: _Floats
    total: _Floats
    kinds: _Floats
    discount: float


@dataclass(frozen=True)
class NGram:
    """A fitted model. `orders[k]` conditions on k tokens; `contexts[k]`, int64 and sorted, numbers those k tokens."""

    vocab_size: int
    orders: tuple[_Order, ...]
    contexts: tuple[_Ids, ...]

    def nats(self, token_lists: Sequence[Sequence[int]]) -> float:
        """Total nats of every token of every list, each list from a fresh start.

        Args:
            token_lists: documents as ids in [0, vocab_size), as in `fit`.

        Raises:
            InputError: an id outside the vocabulary.
        """
        return float(-np.log(self.probs(token_lists)).sum())

    def probs(self, token_lists: Sequence[Sequence[int]]) -> _Floats:
        """The probability of each token given those before it in its list: float64[total tokens], in order."""
        windows = _windows(token_lists, len(self.orders), self.vocab_size)
        tokens = windows[:, -1]
        probs = np.full(len(tokens), 1.0 / self.vocab_size)
        context = np.zeros(len(tokens), np.int64)
        for length, order in enumerate(self.orders):
            if length:
                context = _find(self.contexts[length], context * (self.vocab_size + 1) + windows[:, -1 - length])
            seen = context >= 0
            rows = context[seen]
            pairs = _find(order.keys, rows * (self.vocab_size + 1) + tokens[seen])
            counts = np.where(pairs >= 0, order.counts[pairs], 0.0)
            backed_off = order.discount * order.kinds[rows] * probs[seen]
            probs[seen] = (np.maximum(counts - order.discount, 0.0) + backed_off) / order.total[rows]
            # A context never seen (-1) keeps the shorter one's estimate, as do longer ones: their keys are negative.
        return probs


def fit(token_lists: Sequence[Sequence[int]], order: int = 5, *, vocab_size: int) -> NGram:
    """Counts n-grams up to `order` tokens long.

    Args:
        token_lists: documents as ids in [0, vocab_size). Put the end-of-text token at the end of each, for its
            probability to be part of the score; the start of a document is a context of its own.
        order: tokens that a probability depends on, the predicted one included.
        vocab_size: V; unseen ids have a probability too.

    Raises:
        InputError: nothing to count, or an id outside the vocabulary.
    """
    windows = _windows(token_lists, order, vocab_size)
    base = vocab_size + 1
    tokens = windows[:, -1]
    contexts, ids = [np.zeros(1, np.int64)], [np.zeros(len(windows), np.int64)]
    for length in range(1, order):
        keys, numbers = np.unique(ids[-1] * base + windows[:, -1 - length], return_inverse=True)
        contexts.append(keys)
        ids.append(numbers.reshape(-1).astype(np.int64))
    orders: list[_Order] = []
    longer: _Ids | None = None  # index, among the pairs of this length, of each pair one token longer
    for length in reversed(range(order)):
        keys, index, pair, counts = np.unique(
            ids[length] * base + tokens, return_index=True, return_inverse=True, return_counts=True
        )
        pair = pair.reshape(-1)
        if longer is not None:  # each longer pair counts once: how many different tokens came before this one
            counts = np.bincount(pair[longer], minlength=len(keys))
        rows = ids[length][index]
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        orders.append(
            _Order(
                keys=keys,
                counts=counts.astype(np.float64),
                total=np.bincount(rows, weights=counts, minlength=len(contexts[length])).astype(np.float64),
                kinds=np.bincount(rows, minlength=len(contexts[length])).astype(np.float64),
                discount=once / (once + 2 * twice) if once else 0.5,
            )
        )
        longer = index
    return NGram(vocab_size, tuple(reversed(orders)), tuple(contexts))


def _find(keys: _Ids, wanted: _Ids) -> _Ids:
    """The position of each wanted key among the sorted `keys`, -1 where it is not."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)


def _windows(token_lists: Sequence[Sequence[int]], order: int, vocab_size: int) -> _Ids:
    """int64[total tokens, order]: each token, last, with those before it; `vocab_size` stands before a document."""
    if not any(len(tokens) for tokens in token_lists):
        raise InputError("the n-gram model was given no tokens: give at least one document")
    pad = [vocab_size] * (order - 1)
    flat = np.concatenate([np.asarray([*pad, *tokens], np.int64) for tokens in token_lists])
    real = np.concatenate([np.arange(len(pad) + len(tokens)) for tokens in token_lists]) >= len(pad)
    low, high = flat[real].min(), flat[real].max()
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"the n-gram model was given token ids from {low} to {high}: they must lie in [0, {vocab_size})"
        )
    return np.stack([flat[np.flatnonzero(real) - back] for back in reversed(range(order))], axis=1)
