"""The safetensors format: a header in JSON, then the tensors' bytes, read and written one tensor at a time.

The `safetensors` library checks and reads these files too, but it wants all tensors in memory to write them, maps whole
files to read them (which counts as memory), and its errors do not name the tensor that is cut off. The tests read our
files with it, and ours reads its.

Format: an unsigned 64-bit little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data,
without gaps or overlaps. Source: the README of the safetensors project.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.errors import InputError

_MAX_HEADER = 100_000_000  # bytes; the library's own limit
_TYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2",
        "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "?", "C64": "<c8",
    }.items()
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items()}
# How files start that are often found under this name or in its place, and what to do about them.
_IMPOSTORS = {
    b"PK\x03\x04": "a zip archive as torch.save writes it, which holds a pickle; a pickle can run code, so it is never "
    "opened: save the model as safetensors",
    b"\x80": "a pickle; a pickle can run code, so it is never opened: save the model as safetensors",
    b"version https://git-lfs": "a Git LFS pointer and not the file itself; run git lfs pull",
    b"GGUF": "a GGUF file; read it with jaxlm.load_gguf",
}


class Entry(NamedTuple):
    """Where a tensor lies in its file: type, shape, and the bytes [start, stop) counted from the file's beginning."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their bytes; the layout has been checked against the file's size.

    Raises:
        InputError: not a safetensors file, cut off, or with tensors that overlap or do not fit their shape.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(32)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            what = next((text for magic, text in _IMPOSTORS.items() if start.startswith(magic)), None)
            raise InputError(f"{path}: this is {what}." if what else f"{path}: {_cut(size, 8 + length)}.")
        file.seek(8)
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end, before = 8 + length, ""
    for name, entry in ordered.items():
        if entry.start < end:
            raise InputError(f"{path}: tensor {name} overlaps {before}; the file is damaged, get it again.")
        if entry.start > end:
            raise InputError(f"{path}: bytes before tensor {name} belong to no tensor; the file is damaged.")
        if entry.stop > size:
            raise InputError(f"{path}: tensor {name}: {_cut(size, max(e.stop for e in entries.values()))}.")
        end, before = entry.stop, name
    if end != size:
        raise InputError(f"{path}: {size - end:,} bytes after the last tensor belong to none; the file is damaged.")
    return ordered


def _cut(found: int, expected: int) -> str:
    return f"the file is cut off or damaged ({found:,} bytes where {expected:,} are announced); get it again"


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: tensor {twice} is there twice; the file is damaged.")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is not JSON ({error}); the file is damaged, get it again.") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: the header lists no tensors; the file is damaged, get it again.")
    return header


def _entry(path: Path, name: str, fields: Any, base: int) -> Entry:
    try:
        kind, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = isinstance(kind, str) and start <= stop
        sound = sound and all(type(number) is int and number >= 0 for number in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{path}: tensor {name}: its entry in the header is {fields!r}; the file is damaged.")
    if kind not in _TYPES:
        raise InputError(f"{path}: tensor {name}: type {kind!r} is not supported; save the model in bfloat16.")
    if stop - start != math.prod(shape) * _TYPES[kind].itemsize:
        raise InputError(
            f"{path}: tensor {name}: {stop - start:,} bytes do not hold {kind} of shape {list(shape)}; "
            "the file is damaged, get it again."
        )
    return Entry(_TYPES[kind], shape, base + start, base + stop)


def read_tensor(path: Path, name: str, entry: Entry) -> np.ndarray:
    """One tensor, in memory of its own.

    Raises:
        InputError: the file is shorter than when its header was read.
        OSError: the file cannot be read.
    """
    raw = np.empty(entry.stop - entry.start, np.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.start)
        done = 0
        while done < raw.size and (got := file.readinto(raw[done:].data)):  # a read gives at most 2 GiB
            done += got
    if done < raw.size:
        raise InputError(f"{path}: tensor {name}: the file became shorter while it was read; get it again.")
    return raw.view(entry.dtype).reshape(entry.shape)


def write(path: Path, described: Sequence[tuple[str, np.dtype, tuple[int, ...]]], values: Iterable[np.ndarray]) -> None:
    """Writes tensors one at a time, and waits until they are on the disk.

    Args:
        path: the file, replaced if there is one.
        described: name, type and shape of each tensor; wide types first, so that each is aligned to its own width.
        values: the tensors, in the same order.

    Raises:
        InputError: a type that the format does not have.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, kind, shape in described:
        if kind not in _NAMES:
            raise InputError(f"{path}: tensor {name}: type {kind} cannot be written; convert the weight to float32.")
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, kind, shape), value in zip(described, values, strict=True):
            assert (value.shape, value.dtype) == (shape, kind), name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
