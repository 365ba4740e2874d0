"""Packing: every pair of every document is in exactly one slot, and nothing crosses a document's edge."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jaxlm.data.packing import PackedRows, pack_documents, pack_sequences
from jaxlm.errors import InputError

EOT = 0


def _documents(count: int, low: int, high: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, rng.integers(low, high)).tolist() for _ in range(count)]


def _segments(packed: PackedRows) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, targets, loss mask) of every segment, row by row."""
    out = []
    for row in range(len(packed.tokens)):
        ids = packed.segment_ids[row]
        for segment in range(1, ids.max() + 1):
            chosen = ids == segment
            out.append(
                tuple(array[row][chosen].tolist() for array in (packed.tokens, packed.targets, packed.loss_mask))
            )
    return out


def test_three_documents_by_hand() -> None:
    packed = pack_documents([[1, 2], [3], [4, 5, 6, 7, 8]], eot_id=9, seq_len=5)
    # [1, 2] is 3 pairs and [3] is 2: they fill a row. The last document has 6 pairs and is cut after 5.
    assert packed.tokens.tolist() == [[9, 1, 2, 9, 3], [9, 4, 5, 6, 7], [8, 0, 0, 0, 0]]
    assert packed.targets.tolist() == [[1, 2, 9, 3, 9], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert packed.loss_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert packed.fill == 11 / 15


@pytest.mark.parametrize(("low", "high", "seq_len"), [(1, 20, 32), (1, 100, 32), (10, 11, 11), (1, 9, 1), (5, 6, 1000)])
def test_every_pair_is_in_one_slot(low: int, high: int, seq_len: int) -> None:
    documents = _documents(200, low, high)
    packed = pack_documents(documents, eot_id=EOT, seq_len=seq_len)

    # The segments, in no particular order, are the documents' pairs cut into runs of at most seq_len.
    expected = []
    for document in documents:
        inputs, targets = [EOT, *document], [*document, EOT]
        for start in range(0, len(inputs), seq_len):
            run = slice(start, start + seq_len)
            expected.append((inputs[run], targets[run], [1] * len(inputs[run])))
    assert sorted(_segments(packed)) == sorted(expected)


def test_segments_are_numbered_from_one_and_padding_comes_last() -> None:
    packed = pack_documents(_documents(300, 1, 30), eot_id=EOT, seq_len=64)
    for row in packed.segment_ids:
        real = row[row > 0]
        assert (row[: len(real)] > 0).all()
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}
    padding = packed.segment_ids == 0
    assert padding.any()
    for array in (packed.tokens, packed.targets, packed.loss_mask):
        assert not array[padding].any()
    assert [array.dtype for array in packed] == [np.int32, np.int32, np.int32, np.uint8]


def test_rows_come_in_the_order_of_their_first_document() -> None:
    # Marked by their first token: a reader of the first rows meets the first documents, not the longest.
    documents = [[i + 1, *[0] * int(n)] for i, n in enumerate(np.random.default_rng(1).integers(0, 30, 100))]
    packed = pack_documents(documents, eot_id=0, seq_len=40)
    firsts = [int(row[0]) for row in packed.targets]
    assert firsts == sorted(firsts)
    assert firsts[0] == 1
    within = [
        row[np.flatnonzero(np.diff(segments, prepend=0) > 0)]
        for row, segments in zip(packed.targets, packed.segment_ids, strict=True)
    ]
    assert all((np.diff(row) > 0).all() for row in within)


def test_the_result_is_the_same_every_time() -> None:
    documents = _documents(500, 1, 50)
    first, second = (pack_documents(documents, eot_id=EOT, seq_len=64) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_best_fit_fills_exactly_where_first_fit_would_not() -> None:
    # Pairs 6, 5, 4, 3, 2 in rows of 10. Longest first: 6 | 5 | 4 to 6 (the tighter fit) | 3 to 5 | 2 to 5 + 3.
    documents = [[1] * (n - 1) for n in (6, 5, 4, 3, 2)]
    packed = pack_documents(documents, eot_id=EOT, seq_len=10)
    assert packed.fill == 1.0
    assert len(packed.tokens) == 2


def test_sequences_keep_their_own_loss_masks() -> None:
    sequences = [np.array([0, 5, 6, 7, 0]), np.array([0, 8, 0])]
    masks = [np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1])]
    packed = pack_sequences(sequences, masks, seq_len=6)
    assert packed.tokens.tolist() == [[0, 5, 6, 7, 0, 8]]
    assert packed.targets.tolist() == [[5, 6, 7, 0, 8, 0]]
    assert packed.loss_mask.tolist() == [[0, 1, 1, 1, 0, 1]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2]]


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no document"):
        pack_documents([], eot_id=0, seq_len=8)
    with pytest.raises(InputError, match="document 2 has 0 tokens"):
        pack_documents([[1], []], eot_id=0, seq_len=8)
    with pytest.raises(InputError, match="sequence 1 has 1 tokens"):
        pack_sequences([[1]], [[1]], seq_len=8)
    with pytest.raises(InputError, match="mask of its own length"):
        pack_sequences([[1, 2]], [[1]], seq_len=8)
    with pytest.raises(InputError, match="seq_len"):
        pack_documents([[1]], eot_id=0, seq_len=0)


def test_forty_thousand_documents_pack_in_seconds_and_tightly() -> None:
    rng = np.random.default_rng(0)
    documents = [[1] * n for n in np.clip(rng.lognormal(4.4, 0.7, 40_000).astype(int), 1, 511)]  # 100 tokens on average
    began = time.perf_counter()
    packed = pack_documents(documents, eot_id=EOT, seq_len=512)
    assert time.perf_counter() - began < 5.0  # about 1 s on one idle core
    assert len(packed.tokens) - np.ceil(sum(len(d) + 1 for d in documents) / 512) < 20  # of some 8000 rows
