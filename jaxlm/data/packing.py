"""Packing: documents of any lengths laid into rows of T slots, with nothing crossing a document's edge.

What a model learns from is pairs (input token, target token). A document d1..dn framed by end-of-text tokens,
`EOT d1 .. dn EOT`, gives n + 1 pairs: (EOT, d1), (d1, d2), .. (dn, EOT). A row has T slots of one pair each. Its
`tokens` and `targets` are stored both: at the last slot of a document the next slot's token begins another document,
and where a long document was cut the target is the first token of another row, so neither follows from the other.

Whole documents go to the fullest row that still has room (best fit, longest first: D. S. Johnson et al., "Worst-case
performance bounds for simple one-dimensional packing algorithms", SIAM J. Computing 3, 1974). A document of more than
T pairs is cut into runs of T pairs, so every pair is still in exactly one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlm.errors import InputError


class PackedRows(NamedTuple):
    """Rows of T slots. Slots of padding come last in a row and are 0 in all four arrays."""

    tokens: NDArray[np.int32]  # [N, T] inputs
    targets: NDArray[np.int32]  # [N, T] the token to predict at each slot
    segment_ids: NDArray[np.int32]  # [N, T] 0 padding, 1.. for the documents of the row, in order
    loss_mask: NDArray[np.uint8]  # [N, T] 1 where the target counts

    @property
    def fill(self) -> float:
        """Share of the slots that hold a pair."""
        return float(np.count_nonzero(self.segment_ids) / max(1, self.segment_ids.size))


def pack_documents(documents: Sequence[ArrayLike], *, eot_id: int, seq_len: int) -> PackedRows:
    """Frames each document with `eot_id` and packs them; every target counts.

    Args:
        documents: token ids of each document, without end-of-text tokens.
        eot_id: the token that starts and ends each document.
        seq_len: T, slots per row.

    Returns:
        The rows, in the order of the first document in each; the same for the same input, always.

    Raises:
        InputError: no documents, or an empty one.
    """
    lengths = _lengths(documents, least=1, what="document")
    offsets = np.concatenate([[0], np.cumsum(lengths + 2)])
    flat = np.full(int(offsets[-1]), eot_id, dtype=np.int32)
    inside = np.ones(len(flat), dtype=bool)
    inside[offsets[:-1]] = inside[offsets[1:] - 1] = False
    flat[inside] = np.concatenate([np.asarray(document) for document in documents])
    return _pack(flat, np.ones(len(flat), dtype=np.uint8), lengths + 2, seq_len)


def pack_sequences(sequences: Sequence[ArrayLike], loss_masks: Sequence[ArrayLike], *, seq_len: int) -> PackedRows:
    """Packs sequences that are framed already, each with its own loss mask.

    Args:
        sequences: token ids, n + 1 of them for n pairs.
        loss_masks: for each sequence, a 0 or 1 per token: 1 where that token, as a target, counts. The mark of the
            first token is not used, for it is no pair's target.
        seq_len: T, slots per row.

    Returns:
        The rows, in the order of the first sequence in each; the same for the same input, always.

    Raises:
        InputError: no sequences, one of fewer than two tokens, or a mask of another length.
    """
    lengths = _lengths(sequences, least=2, what="sequence")
    mask_lengths = np.fromiter((len(np.asarray(mask)) for mask in loss_masks), dtype=np.int64)
    if len(mask_lengths) != len(lengths) or (mask_lengths != lengths).any():
        raise InputError("each packed sequence needs a loss mask of its own length.")
    flat = np.concatenate([np.asarray(sequence, dtype=np.int32) for sequence in sequences])
    flat_mask = np.concatenate([np.asarray(mask) for mask in loss_masks]).astype(np.uint8)
    return _pack(flat, flat_mask, lengths, seq_len)


def _lengths(items: Sequence[ArrayLike], *, least: int, what: str) -> NDArray[np.int64]:
    lengths = np.fromiter((len(np.asarray(item)) for item in items), dtype=np.int64)
    if not len(lengths):
        raise InputError(f"there is no {what} to pack.")
    if (lengths < least).any():
        first = int(np.argmax(lengths < least))
        raise InputError(f"{what} {first + 1} has {lengths[first]} tokens, at least {least} needed; remove it.")
    return lengths


def _pack(flat: NDArray[np.int32], mask: NDArray[np.uint8], lengths: NDArray[np.int64], seq_len: int) -> PackedRows:
    """Packs sequences that lie one after another in `flat`, of `lengths` tokens each."""
    if seq_len < 1:
        raise InputError(f"seq_len must be at least 1, found {seq_len}.")
    ends = np.cumsum(lengths)
    is_input = np.ones(len(flat), dtype=bool)
    is_input[ends - 1] = False
    source = np.flatnonzero(is_input)  # pair p is (flat[source[p]], flat[source[p] + 1])

    pairs = lengths - 1
    pieces_per_sequence = -(-pairs // seq_len)
    piece_lengths = np.full(int(pieces_per_sequence.sum()), seq_len, dtype=np.int64)
    piece_lengths[np.cumsum(pieces_per_sequence) - 1] = pairs - (pieces_per_sequence - 1) * seq_len

    row, start, segment, n_rows = _place(piece_lengths, seq_len)
    first_pair = np.cumsum(piece_lengths) - piece_lengths
    slot = np.repeat(row * seq_len + start - first_pair, piece_lengths) + np.arange(len(source))

    def laid_out(values: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
        out = np.zeros(n_rows * seq_len, dtype=dtype)
        out[slot] = values
        return out.reshape(n_rows, seq_len)

    return PackedRows(
        tokens=laid_out(flat[source], np.int32),
        targets=laid_out(flat[source + 1], np.int32),
        segment_ids=laid_out(np.repeat(segment, piece_lengths), np.int32),
        loss_mask=laid_out(mask[source + 1], np.uint8),
    )


def _place(
    lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
    """Best fit, longest first. Returns each piece's row, first slot and segment (from 1), and the number of rows."""
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> bins with exactly that room
    has_room = 0  # bit r is set when by_room[r] is not empty: the tightest fit is one bit operation away
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fits = has_room >> length
        if fits:
            room = length + (fits & -fits).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                has_room ^= 1 << room
            bins[chosen].append(piece)
        else:
            room, chosen = capacity, len(bins)
            bins.append([piece])
        left = room - length
        if left:
            by_room[left].append(chosen)
            has_room |= 1 << left

    # Rows come in the order of their first piece, not of their longest: a reader of the first rows gets a fair sample.
    row = np.empty(len(lengths), dtype=np.int64)
    start, segment = np.empty_like(row), np.empty_like(row)
    members = sorted(sorted(pieces) for pieces in bins)
    for index, pieces in enumerate(members):
        row[pieces] = index
        start[pieces] = np.cumsum(lengths[pieces]) - lengths[pieces]
        segment[pieces] = np.arange(1, len(pieces) + 1)
    return row, start, segment, len(members)
