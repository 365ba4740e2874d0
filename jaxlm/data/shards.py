"""Tokenized rows on disk: raw little-endian files of bounded size, and an index that describes and digests them.

Two layouts, one reader:

- `stream`: one long run of token ids, cut into windows. Row r is ids[r T : r T + T + 1]: T inputs and, one place on,
  T targets, so each token after the first is a target exactly once. The last, shorter window is padded with
  loss_mask 0, or left out for training.
- `rows`: packed rows (`jaxlm.data.packing`), each stored as a block [4, T]: tokens, targets, segment ids, loss mask.

Writing (`jaxlm.data.shard_writer`) returns the index, a dict of plain JSON values for the manifest of the stage;
`RowSet` opens it again. Files are memory-mapped: a batch reads the pages of its rows and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.errors import DiskError, InputError

SCHEMA = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

Index = dict[str, Any]


def token_dtype(vocab_size: int) -> str:
    """`uint16` when every id of the vocabulary fits it, else `uint32`.

    Raises:
        InputError: no vocabulary, or one beyond the int32 ids that models take.
    """
    if not 1 <= vocab_size <= 2**31:
        raise InputError(f"a vocabulary of {vocab_size} tokens cannot be stored; ids must fit int32.")
    return "uint16" if vocab_size <= 2**16 else "uint32"


class RowSet:
    """The rows of one split, opened from its index. Reading has no state: any thread may ask for any rows.

    Attributes:
        n_rows: rows to be had.
        n_targets: targets that count, over all rows.
        seq_len: T.
        vocab_size: V.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        layout: `stream` or `rows`.
        keys: what each batch holds, the same for all batches of this set.
    """

    def __init__(self, directory: str | Path, index: Mapping[str, Any], *, drop_tail: bool = False) -> None:
        """Opens the shards; checks that each is there with its right size, but reads none.

        Args:
            directory: holds the files.
            index: what `write_stream` or `write_rows` returned.
            drop_tail: leave out a last window shorter than T, so that batches need no masks: for training.

        Raises:
            InputError: an index that does not make sense, a missing shard or one of another size, or no whole window.
        """
        self._directory = Path(directory)
        self._index = _checked(index)
        self.layout: str = index["layout"]
        self.seq_len: int = index["seq_len"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        self.n_targets: int = index["n_targets"]
        self._per_shard: int = index["per_shard"]
        total: int = index["count"]
        item_shape = (4, self.seq_len) if self.layout == "rows" else ()
        self._shards = [self._open(shard, item_shape) for shard in index["shards"]]
        if self.layout == "rows":
            self.n_rows, self._padded = total, True
        else:
            whole, rest = divmod(total - 1, self.seq_len)
            self._padded = rest > 0 and not drop_tail
            self.n_rows = whole + self._padded
            if drop_tail:
                self.n_targets = whole * self.seq_len
            if self.n_rows == 0:
                raise InputError(
                    f"{index['name']}: found {total} tokens, {self.seq_len + 1} needed for one window of "
                    f"seq_len={self.seq_len}; use a longer text or a smaller seq_len."
                )
        masks = ("loss_mask", "segment_ids", "positions") if self._padded else ()
        self.keys: tuple[str, ...] = ("tokens", "targets", *masks)

    def batch(self, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The rows at `indices`, in that order.

        Args:
            indices: int64[B], each in [0, n_rows).

        Returns:
            tokens and targets int32[B, T]; and, in the `rows` layout or where the last window is padded, loss_mask
            float32[B, T], segment_ids int32[B, T] (0 at padding) and positions int32[B, T], from 0 in each segment.

        Raises:
            InputError: no such row, or an id outside the vocabulary in one of them.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.n_rows):
            raise InputError(f"{self._index['name']} has rows 0 to {self.n_rows - 1}; asked for {wanted.tolist()}.")
        return self._packed_batch(wanted) if self.layout == "rows" else self._stream_batch(wanted)

    def verify(self) -> None:
        """Reads every shard and compares its digest.

        Raises:
            InputError: names each damaged shard.
        """
        damaged = [
            shard["file"]
            for shard, data in zip(self._index["shards"], self._shards, strict=True)
            if hashlib.sha256(data.data).hexdigest() != shard["sha256"]
        ]
        if damaged:
            raise InputError(
                f"{self._directory}: damaged shard {', '.join(damaged)} (the sha256 differs from the index); "
                "delete the directory and tokenize again."
            )

    def _open(self, shard: Mapping[str, Any], item_shape: tuple[int, ...]) -> NDArray[Any]:
        path = self._directory / shard["file"]
        dtype = DTYPES[self._index["dtype"]]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise InputError(f"{path}: this shard is missing; delete the directory and tokenize again.") from None
        except OSError as error:
            raise DiskError(f"{path}: cannot be read ({error.strerror}).") from None
        if size != shard["bytes"]:
            odd = f", not a whole number of {dtype.itemsize}-byte ids" if size % dtype.itemsize else ""
            raise InputError(
                f"{path}: found {size} bytes{odd}, expected {shard['bytes']}; delete the directory and tokenize again."
            )
        try:
            # A plain array on the mapped pages: slicing np.memmap itself costs several times as much.
            return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(shard["count"], *item_shape)))
        except OSError as error:
            raise DiskError(f"{path}: cannot be read ({error.strerror}).") from None

    def _stream_batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        width = self.seq_len + 1
        window = np.zeros((len(rows), width), dtype=np.int32)
        numbers, offsets = np.divmod(rows * self.seq_len, self._per_shard)
        for i, (number, offset) in enumerate(zip(numbers.tolist(), offsets.tolist(), strict=True)):
            piece = self._shards[number][offset : offset + width]
            window[i, : len(piece)] = piece
            filled = len(piece)
            while filled < width and number + 1 < len(self._shards):  # the window goes on in the next shard
                number += 1
                piece = self._shards[number][: width - filled]
                window[i, filled : filled + len(piece)] = piece
                filled += len(piece)
        self._check(window, rows)
        batch: dict[str, NDArray[Any]] = {
            "tokens": window[:, :-1].copy(),
            "targets": np.ascontiguousarray(window[:, 1:]),
        }
        if self._padded:
            left = self._index["count"] - 1 - rows * self.seq_len  # pairs from this row on
            slots = np.arange(self.seq_len, dtype=np.int32)
            valid = slots < left[:, None]
            batch["loss_mask"] = valid.astype(np.float32)
            batch["segment_ids"] = valid.astype(np.int32)
            batch["positions"] = slots * batch["segment_ids"]
            batch["tokens"] *= batch["segment_ids"]  # the last id of all is a target only, not an input
        return batch

    def _packed_batch(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        block = np.empty((len(rows), 4, self.seq_len), dtype=np.int32)
        numbers, offsets = np.divmod(rows, self._per_shard)
        for i, (number, offset) in enumerate(zip(numbers.tolist(), offsets.tolist(), strict=True)):
            block[i] = self._shards[number][offset]
        self._check(block[:, :2], rows)
        tokens, targets, segment_ids, loss_mask = (np.ascontiguousarray(block[:, k]) for k in range(4))
        return {
            "tokens": tokens,
            "targets": targets,
            "loss_mask": loss_mask.astype(np.float32),
            "segment_ids": segment_ids,
            "positions": positions_in_segments(segment_ids),
        }

    def _check(self, ids: NDArray[np.int32], rows: NDArray[np.int64]) -> None:
        # XLA clamps an id outside the table without a word, so a damaged page would train on wrong tokens.
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            bad = int(rows[np.argmax(((ids >= self.vocab_size) | (ids < 0)).reshape(len(rows), -1).any(axis=1))])
            raise InputError(
                f"{self._directory}: row {bad} of {self._index['name']} holds an id outside the vocabulary of "
                f"{self.vocab_size}; the shard is damaged, delete the directory and tokenize again."
            )


def positions_in_segments(segment_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Places within each segment: int32[B, T] segment ids -> int32[B, T], from 0 wherever the id changes."""
    slots = np.arange(segment_ids.shape[1], dtype=np.int32)
    starts = np.zeros_like(segment_ids)
    starts[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]) * slots[1:]
    return slots - np.maximum.accumulate(starts, axis=1)


def _checked(index: Mapping[str, Any]) -> Mapping[str, Any]:
    """The index, once its parts have been found to agree with one another."""
    name = index.get("name", "data")

    def require(holds: bool, field: str, found: Any) -> None:
        if not holds:
            raise InputError(f"{name}: the index's {field} is {found!r}, which cannot be; tokenize again.")

    require(index.get("schema") == SCHEMA, "schema", index.get("schema"))
    require(index.get("layout") in ("stream", "rows"), "layout", index.get("layout"))
    require(index.get("dtype") in DTYPES, "dtype", index.get("dtype"))
    for field in ("vocab_size", "seq_len", "count", "per_shard", "n_targets"):
        require(isinstance(index.get(field), int) and index[field] > 0, field, index.get(field))
    require(isinstance(index.get("tokenizer_fingerprint"), str), "tokenizer_fingerprint", None)
    require(
        token_dtype(index["vocab_size"]) == index["dtype"], f"dtype for {index['vocab_size']} tokens", index["dtype"]
    )
    counts = [shard.get("count") for shard in index.get("shards", ())]
    full, rest = divmod(index["count"], index["per_shard"])
    require(counts == [index["per_shard"]] * full + [rest] * (rest > 0), "list of shard counts", counts)
    item = DTYPES[index["dtype"]].itemsize * (4 * index["seq_len"] if index["layout"] == "rows" else 1)
    for shard in index["shards"]:
        require(shard.get("bytes") == shard["count"] * item, f"size of {shard.get('file')}", shard.get("bytes"))
    return index
