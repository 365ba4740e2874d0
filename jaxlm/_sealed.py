"""JSON files that carry their own digest, so that a change to any byte of them shows. Loads no jax."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm._disk import disk_errors, write_atomic
from jaxlm._json import read_json, unreadable
from jaxlm.errors import InputError

_FIRST, _LAST = "sealed", "sha256"  # two marks, so that damage to one of them is not taken for a file without a seal


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Puts a JSON object at `path` with its digest; a reader sees the old file or the whole new one.

    Raises:
        ValueError: a number in it is not finite.
        DiskError: the disk is full or failing.
    """
    data = _sealed(value)
    with disk_errors(f"write {path.name}", path.parent):
        write_atomic(path, data)


def read_sealed(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The object that `write_sealed` put there. A file without any seal, of an older version, is taken as it is.

    Args:
        path: the file.
        hint: what to do when it is missing or damaged; ends the sentence.

    Raises:
        InputError: no such file, not a JSON object, or not byte by byte what was written.
        DiskError: the file cannot be read.
    """
    value = read_json(path, hint=hint)
    if _FIRST not in value and _LAST not in value:
        return value
    body = {key: item for key, item in value.items() if key not in (_FIRST, _LAST)}
    try:
        whole = _sealed(body) == path.read_bytes()
    except (FileNotFoundError, ValueError):  # removed meanwhile, or a number that is not finite: not what we write
        whole = False
    except OSError as error:
        raise unreadable(path, error) from None
    if not whole:
        ending = f"; {hint}." if hint else "."
        raise InputError(f"{path}: does not match its own digest, the file is damaged{ending}")
    return body


def _sealed(value: Mapping[str, Any]) -> bytes:
    body = {_FIRST: 1, **value}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, allow_nan=False)
    body[_LAST] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
