"""jax's cache of compiled programs on disk (JAX_COMPILATION_CACHE_DIR), kept free of what a killed process left half.

jax writes an entry in place and never replaces one: an entry that is cut short fails to load at every later start, and
its program is compiled again each time. Loads no jax.
"""

from __future__ import annotations

import importlib
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
CHECKED = ".jaxlm-checked"  # its time: entries from before it have been found whole
_ZSTD = b"\x28\xb5\x2f\xfd"


def remove_damaged(directory: Path) -> list[str]:
    """Removes the entries that cannot be unpacked, of those written since the last call.

    An entry that another process is just writing may be among them; that costs its compilation, once.

    Returns:
        Their names.
    """
    if "://" in str(directory) or not directory.is_dir():
        return []
    mark = directory / CHECKED
    removed = []
    try:
        since = mark.stat().st_mtime_ns if mark.exists() else 0
        mark.touch()
        for entry in directory.glob("*-cache"):
            with suppress(FileNotFoundError):  # another process removed it
                if entry.stat().st_mtime_ns >= since and not whole(entry.read_bytes()):
                    entry.unlink()
                    removed.append(entry.name)
    except OSError:  # a cache that cannot be read or written is none; jax says so itself
        return removed
    return removed


def whole(entry: bytes) -> bool:
    """Whether an entry unpacks to its end; True where nobody here can tell."""
    if not entry.startswith(_ZSTD):
        unpacker = zlib.decompressobj()
        try:
            unpacker.decompress(entry)
        except zlib.error:
            return False
        return unpacker.eof
    zstd: Any
    for name in ("compression.zstd", "zstandard"):
        with suppress(ImportError):
            zstd = importlib.import_module(name)
            break
    else:
        return True
    try:
        zstd.decompress(entry)
    except zstd.ZstdError:
        return False
    return True


def remove_damaged_of_environment() -> list[str]:
    """`remove_damaged` for the cache that the environment names, if it names one."""
    named = os.environ.get(VARIABLE)
    return remove_damaged(Path(named)) if named else []
