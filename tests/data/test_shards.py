"""Rows on disk: what is written is read back, and damage or nonsense is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.packing import pack_documents, pack_sequences
from jaxlm.data.shard_writer import write_rows, write_stream
from jaxlm.data.shards import RowSet, positions_in_segments, token_dtype
from jaxlm.errors import InputError

T = 16


def _stream(directory: Path, ids: Any, **options: Any) -> dict[str, Any]:
    options = {"name": "train", "seq_len": T, "vocab_size": 1000, "tokenizer_fingerprint": "f", **options}
    return write_stream(directory, ids, **options)


def _ids(count: int, vocab_size: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count)


@pytest.mark.parametrize("shard_bytes", [2, 14, 34, 2 * T * 5, 10**6])
def test_stream_windows_are_slices_of_the_ids(tmp_path: Path, shard_bytes: int) -> None:
    ids = _ids(T * 20 + 1)
    index = json.loads(json.dumps(_stream(tmp_path, ids, shard_bytes=shard_bytes)))  # as a manifest would hold it
    rows = RowSet(tmp_path, index)
    rows.verify()
    assert (rows.n_rows, rows.seq_len, rows.vocab_size, rows.tokenizer_fingerprint) == (20, T, 1000, "f")
    assert rows.n_targets == T * 20
    assert len(index["shards"]) == -(-len(ids) * 2 // (shard_bytes // 2 * 2))
    chosen = np.array([19, 0, 7, 7, 3])
    batch = rows.batch(chosen)
    assert tuple(batch) == rows.keys == ("tokens", "targets")
    for place, row in enumerate(chosen):
        np.testing.assert_array_equal(batch["tokens"][place], ids[row * T : row * T + T])
        np.testing.assert_array_equal(batch["targets"][place], ids[row * T + 1 : row * T + T + 1])
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32


@pytest.mark.parametrize("extra", [1, 2, T - 1])
def test_a_ragged_tail_scores_every_token_once(tmp_path: Path, extra: int) -> None:
    ids = _ids(T * 3 + 1 + extra)
    rows = RowSet(tmp_path, _stream(tmp_path, ids, shard_bytes=10))
    assert rows.n_rows == 4
    assert rows.keys == ("tokens", "targets", "loss_mask", "segment_ids", "positions")
    batch = rows.batch(np.arange(4))
    counts = batch["loss_mask"] == 1
    np.testing.assert_array_equal(batch["targets"][counts], ids[1:])
    np.testing.assert_array_equal(batch["tokens"][counts], ids[:-1])
    np.testing.assert_array_equal(batch["segment_ids"], counts)
    assert counts.sum() == rows.n_targets == len(ids) - 1
    for key in ("tokens", "targets", "positions"):
        assert not batch[key][~counts].any()
    np.testing.assert_array_equal(batch["positions"][0], np.arange(T))
    np.testing.assert_array_equal(batch["positions"][3], [*range(extra), *[0] * (T - extra)])
    # The same keys and types for whole rows, so that a jitted function is compiled once.
    alone = rows.batch(np.array([0]))
    assert {key: value.dtype for key, value in alone.items()} == {key: value.dtype for key, value in batch.items()}
    assert [batch[key].dtype for key in rows.keys] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_training_drops_the_tail(tmp_path: Path) -> None:
    ids = _ids(T * 3 + 1 + 5)
    rows = RowSet(tmp_path, _stream(tmp_path, ids), drop_tail=True)
    assert (rows.n_rows, rows.n_targets, rows.keys) == (3, 3 * T, ("tokens", "targets"))
    np.testing.assert_array_equal(rows.batch(np.arange(3))["tokens"].reshape(-1), ids[: 3 * T])


def test_ids_may_come_in_chunks(tmp_path: Path) -> None:
    ids = _ids(1000)
    whole = _stream(tmp_path / "a", ids, shard_bytes=300)
    parts = _stream(tmp_path / "b", iter(np.split(ids, [1, 1, 100, 777])), shard_bytes=300)
    assert whole == parts
    assert [shard["bytes"] for shard in whole["shards"]] == [300] * 6 + [200]
    assert (tmp_path / "b" / "train-00003.bin").read_bytes() == ids[450:600].astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32"), (2**31, "uint32")]
)
def test_the_dtype_holds_the_largest_id(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    ids = np.full(T + 1, vocab_size - 1, dtype=np.int64)
    rows = RowSet(tmp_path, _stream(tmp_path, ids, vocab_size=vocab_size))
    assert (rows.batch(np.array([0]))["targets"] == vocab_size - 1).all()


@pytest.mark.parametrize("shard_bytes", [1, 4 * T * 2 * 7, 10**6])
def test_packed_rows_come_back(tmp_path: Path, shard_bytes: int) -> None:
    rng = np.random.default_rng(0)
    packed = pack_documents([rng.integers(1, 99, rng.integers(1, 12)) for _ in range(50)], eot_id=0, seq_len=T)
    index = write_rows(tmp_path, packed, name="sft", vocab_size=99, tokenizer_fingerprint="f", shard_bytes=shard_bytes)
    rows = RowSet(tmp_path, json.loads(json.dumps(index)))
    rows.verify()
    assert rows.n_rows == len(packed.tokens)
    assert index["fill"] == packed.fill
    assert rows.n_targets == packed.loss_mask.sum()
    chosen = rng.permutation(rows.n_rows)
    batch = rows.batch(chosen)
    assert tuple(batch) == rows.keys
    for key in ("tokens", "targets", "segment_ids", "loss_mask"):
        np.testing.assert_array_equal(batch[key], getattr(packed, key)[chosen])
    assert [batch[key].dtype for key in rows.keys] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_packed_rows_may_come_in_parts(tmp_path: Path) -> None:
    parts = [pack_documents([[i, i, i]] * 5, eot_id=0, seq_len=8) for i in (1, 2, 3)]
    index = write_rows(tmp_path, iter(parts), name="t", vocab_size=9, tokenizer_fingerprint="f", shard_bytes=200)
    got = RowSet(tmp_path, index).batch(np.arange(index["count"]))["tokens"]
    np.testing.assert_array_equal(got, np.concatenate([part.tokens for part in parts]))


def test_positions_restart_in_each_segment() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 4, 4, 5, 0]], dtype=np.int32)
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 2, 0, 0]]
    assert positions_in_segments(segments).tolist() == expected


@pytest.mark.parametrize("bad", [1000, 70_000, 2**32 + 5, -1])
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, bad: int) -> None:
    ids = _ids(100)
    ids[42] = bad
    with pytest.raises(InputError, match=rf"train: token id {bad} at place 42 is outside the vocabulary of 1000"):
        _stream(tmp_path, np.split(ids, 4))
    packed = pack_sequences([[0, 5, 0]], [[1, 1, 1]], seq_len=4)
    with pytest.raises(InputError, match="sft: token id 5"):
        write_rows(tmp_path, packed, name="sft", vocab_size=5, tokenizer_fingerprint="f")


def test_ids_must_be_integers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found float64"):
        _stream(tmp_path, np.zeros(100))


def test_a_corpus_shorter_than_a_window(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"train: found {T} tokens, {T + 1} needed for one training window"):
        _stream(tmp_path, _ids(T), for_training=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="found 1 tokens, 2 needed"):
        _stream(tmp_path, _ids(1))
    with pytest.raises(InputError, match="found 0 tokens"):
        _stream(tmp_path, [])
    short = _stream(tmp_path, _ids(T))  # enough for an evaluation
    assert RowSet(tmp_path, short).n_targets == T - 1
    with pytest.raises(InputError, match=rf"found {T} tokens, {T + 1} needed"):
        RowSet(tmp_path, short, drop_tail=True)


def test_a_vocabulary_too_large_for_int32(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ids must fit int32"):
        _stream(tmp_path, _ids(100), vocab_size=2**31 + 1)


def test_everything_masked_or_empty(tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "sft", "vocab_size": 9, "tokenizer_fingerprint": "f"}
    with pytest.raises(InputError, match="everything is masked"):
        write_rows(tmp_path, pack_sequences([[1, 2, 3]], [[1, 0, 0]], seq_len=4), **options)
    with pytest.raises(InputError, match="no rows"):
        write_rows(tmp_path, [], **options)
    parts = [pack_documents([[1]], eot_id=0, seq_len=n) for n in (4, 5)]
    with pytest.raises(InputError, match="5 slots follow rows of 4"):
        write_rows(tmp_path, parts, **options)


class TestDamage:
    @pytest.fixture
    def index(self, tmp_path: Path) -> dict[str, Any]:
        return _stream(tmp_path, _ids(1000), shard_bytes=500)

    def test_a_missing_shard(self, tmp_path: Path, index: dict[str, Any]) -> None:
        (tmp_path / "train-00002.bin").unlink()
        with pytest.raises(InputError, match=r"train-00002\.bin: this shard is missing"):
            RowSet(tmp_path, index)

    @pytest.mark.parametrize(("size", "odd"), [(499, True), (498, False), (0, False), (502, False)])
    def test_another_size(self, tmp_path: Path, index: dict[str, Any], size: int, odd: bool) -> None:
        os.truncate(tmp_path / "train-00001.bin", size)
        with pytest.raises(InputError, match=rf"train-00001\.bin: found {size} bytes.*, expected 500") as caught:
            RowSet(tmp_path, index)
        assert ("not a whole number of 2-byte ids" in str(caught.value)) == odd

    def test_one_corrupt_shard_of_many(self, tmp_path: Path, index: dict[str, Any]) -> None:
        path = tmp_path / "train-00003.bin"
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        rows = RowSet(tmp_path, index)  # the size is right
        with pytest.raises(InputError, match=r"damaged shard train-00003\.bin \("):
            rows.verify()

    def test_a_damaged_id_is_caught_when_it_is_read(self, tmp_path: Path, index: dict[str, Any]) -> None:
        path = tmp_path / "train-00000.bin"
        data = bytearray(path.read_bytes())
        data[2 * (T * 4 + 3) + 1] = 0xFF  # the high byte of a token of row 4
        path.write_bytes(data)
        rows = RowSet(tmp_path, index)
        rows.batch(np.array([0, 1, 2, 3, 5]))
        with pytest.raises(InputError, match="row 4 of train holds an id outside the vocabulary of 1000"):
            rows.batch(np.array([0, 4]))

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"schema": 99}, "schema is 99"),
            ({"layout": "columns"}, "layout is 'columns'"),
            ({"vocab_size": 100_000}, "dtype for 100000 tokens is 'uint16'"),
            ({"count": 1001}, "list of shard counts"),
            ({"count": None}, "count is None"),
            ({"seq_len": 0}, "seq_len is 0"),
            ({"shards": []}, "list of shard counts"),
        ],
    )
    def test_an_index_that_cannot_be(
        self, tmp_path: Path, index: dict[str, Any], change: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(InputError, match=named):
            RowSet(tmp_path, {**index, **change})

    @pytest.mark.parametrize("row", [-1, 62])
    def test_a_row_that_is_not_there(self, tmp_path: Path, index: dict[str, Any], row: int) -> None:
        rows = RowSet(tmp_path, index, drop_tail=True)
        assert rows.n_rows == 62  # 999 pairs are 62 windows of 16, and 7 more
        with pytest.raises(InputError, match="rows 0 to 61"):
            rows.batch(np.array([row]))


def test_a_full_disk_is_a_disk_error(tmp_path: Path) -> None:
    code = f"""
import resource, signal, numpy as np
from jaxlm.data.shard_writer import write_stream
from jaxlm.errors import DiskError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ids = np.zeros(5000, int)
    write_stream({str(tmp_path)!r}, ids, name="train", seq_len=16, vocab_size=9, tokenizer_fingerprint="f")
except DiskError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train-00000.bin: cannot be written (File too large)" in out.stdout


def test_a_path_with_spaces_and_other_letters(tmp_path: Path) -> None:
    directory = tmp_path / "a folder" / "données-数据"
    index = _stream(directory, _ids(100))
    assert RowSet(str(directory), index).n_rows == 7


@pytest.mark.parametrize("shards", [1, 40])
def test_a_batch_takes_a_fraction_of_a_millisecond(tmp_path: Path, shards: int) -> None:
    count = 1_000_000
    rows = RowSet(tmp_path, _stream(tmp_path, _ids(count), seq_len=128, shard_bytes=2 * count // shards))
    chosen = np.random.default_rng(1).integers(0, rows.n_rows, (20, 50, 32))

    def once(batches: np.ndarray) -> float:
        began = time.perf_counter()
        for batch in batches:
            rows.batch(batch)
        return (time.perf_counter() - began) / len(batches)

    # 32 rows of 129 tokens: about 0.05 ms on one idle core; the best of many tries, and room for a busy machine.
    assert min(once(batches) for batches in chosen) < 0.5e-3
