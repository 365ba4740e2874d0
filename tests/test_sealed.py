"""JSON files with a digest of their own: any change to any byte shows."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxlm._disk import write_atomic
from jaxlm._sealed import read_sealed, write_sealed
from jaxlm.errors import DiskError, InputError

VALUE = {"name": "naïve 数据", "numbers": [1, 2.5, 1e-300, None, True], "deep": {"b": {}, "a": "x"}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.json", VALUE)
    assert read_sealed(tmp_path / "a.json") == VALUE
    assert list(read_sealed(tmp_path / "a.json")) == list(VALUE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_flipped_bit_in_any_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, VALUE)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"a\.json: "):
            read_sealed(path)
    for other in (data + b"\n", data[:-1], b"", data * 2, bytes(len(data))):
        path.write_bytes(other)
        with pytest.raises(InputError, match=r"a\.json: .*; make it again\."):
            read_sealed(path, hint="make it again")


def test_a_file_that_cannot_be_read_again_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears of damage may remove it. The first reading goes well, the one for the digest does not."""
    write_sealed(tmp_path / "a.json", VALUE)
    readings = iter([(tmp_path / "a.json").read_bytes()])

    def read(path: Path) -> bytes:
        for data in readings:
            return data
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(DiskError, match=r"a\.json: cannot be read \(Stale file handle\); check the disk"):
        read_sealed(tmp_path / "a.json")


def test_a_file_from_before_there_were_seals_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(VALUE))
    assert read_sealed(path) == VALUE


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_sealed(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each writes the file whole, and what a killed writer left under the temporary name is used again."""
    path, texts = tmp_path / "x.json", [bytes([65 + i]) * 20_000 for i in range(4)]
    (tmp_path / ".x.json.tmp").write_bytes(b"left by a killed process")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: write_atomic(path, texts[i % 4]), range(80)))
    assert path.read_bytes() in texts
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]
