"""The cache of compiled programs: entries that a killed process left half are removed, whole ones stay."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from jaxlm._compiled import CHECKED, remove_damaged, remove_damaged_of_environment, whole

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

PROGRAM = bytes(range(256)) * 400
PACKED = {"zlib": zlib.compress(PROGRAM)}
if zstandard is not None:
    PACKED["zstd"] = zstandard.ZstdCompressor().compress(PROGRAM)  # as jax writes it where zstandard is installed


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_an_entry_that_is_cut_anywhere_is_not_whole(kind: str) -> None:
    data = PACKED[kind]
    assert whole(data)
    assert not [n for n in range(len(data)) if whole(data[:n])]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != CHECKED)


def test_damaged_entries_are_removed_and_checked_ones_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in {**PACKED, "cut": PACKED["zlib"][:-1], "empty": b""}.items():
        (tmp_path / f"jit_{name}-cache").write_bytes(data)
    (tmp_path / "jit_zlib-atime").write_bytes(b"12345678")
    assert sorted(remove_damaged(tmp_path)) == ["jit_cut-cache", "jit_empty-cache"]
    kept = [*(f"jit_{name}-cache" for name in sorted(PACKED)), "jit_zlib-atime"]
    assert entries(tmp_path) == sorted(kept)
    old = tmp_path / "jit_zlib-cache"
    old.write_bytes(b"")
    os.utime(old, ns=(1, 1))  # from before the last check: not looked at
    assert remove_damaged(tmp_path) == []
    old.write_bytes(b"")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert remove_damaged_of_environment() == ["jit_zlib-cache"]


def test_no_cache_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remove_damaged(tmp_path / "absent") == []
    assert remove_damaged(Path("gs://bucket/cache")) == []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert remove_damaged_of_environment() == []
