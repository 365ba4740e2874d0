"""Writes the files of `jaxlm.data.shards` and returns the index that describes and digests them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlm.data.packing import PackedRows
from jaxlm.data.shards import DTYPES, SCHEMA, Index, token_dtype
from jaxlm.errors import DiskError, InputError

SHARD_BYTES = 256 * 1024 * 1024


def write_stream(
    directory: str | Path,
    ids: NDArray[Any] | Iterable[NDArray[Any]],
    *,
    name: str,
    seq_len: int,
    vocab_size: int,
    tokenizer_fingerprint: str,
    for_training: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Index:
    """Writes token ids as `stream` shards `<name>-00000.bin` and on.

    Args:
        directory: where the files go; made when it is missing.
        ids: all ids as one integer array, or as arrays that follow one another (held one shard at a time).
        name: of the split, the stem of the file names.
        seq_len: T, the window that the reader cuts.
        vocab_size: V; decides the width of an id on disk.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        for_training: demand one whole window of T + 1 tokens.
        shard_bytes: largest size of a file.

    Returns:
        The index.

    Raises:
        InputError: an id outside the vocabulary, fewer than 2 tokens, or fewer than a window when `for_training`.
        DiskError: the disk is full or not writable.
    """
    writer = _Writer(directory, name, vocab_size, (), shard_bytes)
    for chunk in [ids] if isinstance(ids, np.ndarray) else ids:
        writer.add(np.asarray(chunk).reshape(-1))
    need = seq_len + 1 if for_training else 2
    if writer.count < need:
        why = f"one training window of seq_len={seq_len}" if for_training else "one input and its target"
        raise InputError(
            f"{name}: found {writer.count} tokens, {need} needed for {why}; use a longer text or a smaller seq_len."
        )
    shards = writer.finish()
    return _index("stream", name, seq_len, vocab_size, tokenizer_fingerprint, writer, shards, writer.count - 1)


def write_rows(
    directory: str | Path,
    packed: PackedRows | Iterable[PackedRows],
    *,
    name: str,
    vocab_size: int,
    tokenizer_fingerprint: str,
    shard_bytes: int = SHARD_BYTES,
) -> Index:
    """Writes packed rows as `rows` shards `<name>-00000.bin` and on.

    Args:
        directory: where the files go; made when it is missing.
        packed: the rows, at once or in parts of equal T (a large corpus is packed a part at a time).
        name: of the split, the stem of the file names.
        vocab_size: V; decides the width of an id on disk.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        shard_bytes: largest size of a file.

    Returns:
        The index.

    Raises:
        InputError: an id outside the vocabulary, no rows, no target that counts, or rows of different lengths.
        DiskError: the disk is full or not writable.
    """
    writer: _Writer | None = None
    seq_len = scored = filled = 0
    for part in [packed] if isinstance(packed, PackedRows) else packed:
        if writer is None:
            seq_len = part.tokens.shape[1]
            writer = _Writer(directory, name, vocab_size, (4, seq_len), shard_bytes)
            if seq_len > np.iinfo(writer.dtype).max:
                raise InputError(f"{name}: seq_len={seq_len} is above {np.iinfo(writer.dtype).max}, the most per row.")
        if part.tokens.shape[1] != seq_len:
            raise InputError(f"{name}: packed rows of {part.tokens.shape[1]} slots follow rows of {seq_len}.")
        _check_ids(part.targets, vocab_size, name)
        _check_ids(part.tokens, vocab_size, name)
        scored += int(part.loss_mask.sum(dtype=np.int64))
        filled += int(np.count_nonzero(part.segment_ids))
        writer.add(np.stack([part.tokens, part.targets, part.segment_ids, part.loss_mask], axis=1), checked=True)
    if writer is None or writer.count == 0:
        raise InputError(f"{name}: there are no rows to write; give at least one document.")
    if scored == 0:
        raise InputError(f"{name}: no target counts in any row, everything is masked; check the loss masks.")
    index = _index("rows", name, seq_len, vocab_size, tokenizer_fingerprint, writer, writer.finish(), scored)
    return {**index, "fill": filled / (writer.count * seq_len)}


class _Writer:
    """Collects items (ids, or blocks of a row) and writes each full shard; holds at most one shard and one chunk."""

    def __init__(
        self, directory: str | Path, name: str, vocab_size: int, item_shape: tuple[int, ...], shard_bytes: int
    ) -> None:
        self.dtype = DTYPES[token_dtype(vocab_size)]
        self.count = 0
        self.per_shard = max(1, shard_bytes // (self.dtype.itemsize * int(np.prod(item_shape, dtype=np.int64))))
        self._directory, self._name, self._vocab_size = Path(directory), name, vocab_size
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0
        self._shards: list[dict[str, Any]] = []
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"{self._directory}: cannot be made ({error.strerror}); free space or choose another."
            ) from None

    def add(self, items: NDArray[Any], *, checked: bool = False) -> None:
        if not checked:
            _check_ids(items, self._vocab_size, self._name, self.count)
        self._waiting.append(items.astype(self.dtype))
        self._n_waiting += len(items)
        self.count += len(items)
        if self._n_waiting >= self.per_shard:
            self._flush(whole_only=True)

    def finish(self) -> list[dict[str, Any]]:
        self._flush(whole_only=False)
        return self._shards

    def _flush(self, *, whole_only: bool) -> None:
        items = np.concatenate(self._waiting)
        end = len(items) // self.per_shard * self.per_shard if whole_only else len(items)
        for start in range(0, end, self.per_shard):
            self._write(items[start : min(end, start + self.per_shard)])
        self._waiting, self._n_waiting = [items[end:].copy()], len(items) - end

    def _write(self, items: NDArray[Any]) -> None:
        data = np.ascontiguousarray(items).data
        path = self._directory / f"{self._name}-{len(self._shards):05d}.bin"
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the manifest that vouches for it
        except OSError as error:
            raise DiskError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another root."
            ) from None
        digest = hashlib.sha256(data).hexdigest()
        self._shards.append({"file": path.name, "count": len(items), "bytes": data.nbytes, "sha256": digest})


def _check_ids(ids: NDArray[Any], vocab_size: int, name: str, before: int = 0) -> None:
    if ids.dtype.kind not in "iu" and ids.size:
        raise InputError(f"{name}: token ids must be integers, found {ids.dtype}.")
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        place = int(np.argmax(((ids < 0) | (ids >= vocab_size)).reshape(-1)))
        raise InputError(
            f"{name}: token id {int(ids.reshape(-1)[place])} at place {before + place} is outside the vocabulary of "
            f"{vocab_size}; the tokenizer and the vocabulary size do not belong together."
        )


def _index(
    layout: str, name: str, seq_len: int, vocab_size: int, fingerprint: str, writer: _Writer,
    shards: list[dict[str, Any]], n_targets: int,
) -> Index:  # fmt: skip
    return {
        "schema": SCHEMA,
        "layout": layout,
        "name": name,
        "dtype": token_dtype(vocab_size),
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": fingerprint,
        "seq_len": seq_len,
        "count": writer.count,  # ids of a stream, rows of rows
        "per_shard": writer.per_shard,
        "n_targets": n_targets,
        "shards": shards,
    }
