"""Reads documents, exactly: what is not UTF-8, empty or damaged is an error that names its place, never repaired."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from jaxlm.errors import DiskError, InputError

_SUFFIXES = (".txt", ".jsonl")


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file or of a directory.

    A `.jsonl` file has one document a line, in the field `text`; any other file is one document. Of a directory, the
    `.txt` and `.jsonl` files are read, at any depth, in the order of their paths. Line endings stay as they are; a
    byte order mark at the start of a file is dropped.

    Args:
        path: a UTF-8 file, or a directory of such files.

    Returns:
        The texts, none of them empty.

    Raises:
        InputError: nothing there, no documents, an empty one, bytes that are not UTF-8, a NUL byte, or a line that is
            not a JSON object with a `text`; names the file and the byte or line.
        DiskError: a file cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return list(_documents(path))
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"{path}: this directory has no .txt or .jsonl file; point data.path at the text.")
    return [document for file in files for document in _documents(file)]


def read_text(path: str | Path) -> str:
    """The whole of one UTF-8 file, without a byte order mark.

    Args:
        path: the file.

    Returns:
        Its characters, line endings as they are.

    Raises:
        InputError: no such file, an empty one, bytes that are not UTF-8, or a NUL byte; names the byte.
        DiskError: the file cannot be read.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise InputError(f"{path}: no such file; check the path.") from None
    except OSError as error:
        raise DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions.") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8."
        ) from None
    nul = raw.find(b"\0")
    if nul >= 0:
        raise InputError(f"{path}: byte {nul} is NUL, which no text holds; the file is damaged or not a text.")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold some text.")
    return text


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON Lines file, each with its place as `file:line`. Blank lines are passed over.

    Args:
        path: a UTF-8 file.

    Yields:
        (place, value).

    Raises:
        InputError: as `read_text`, or a line that is not JSON.
        DiskError: the file cannot be read.
    """
    # Not str.splitlines, which also splits at characters that JSON strings may hold, such as U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not a JSON value ({error}); put one JSON object on each line.") from None


def checked_text(value: Any, place: str, field: str) -> str:
    """`value` as a text that a tokenizer can take and a file can hold.

    Args:
        value: what was found in a JSON field.
        place: where, for the message.
        field: the field's name, for the message.

    Returns:
        The same text.

    Raises:
        InputError: not a string, only white space, a NUL, or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise InputError(f"{place}: field {field!r} must be a string, found {kind_of(value)}.")
    if not value.strip():
        raise InputError(f"{place}: field {field!r} is empty; fill it or remove the record.")
    if "\0" in value:
        raise InputError(f"{place}: field {field!r} holds a NUL at character {value.index(chr(0))}; remove it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: field {field!r} holds half a surrogate pair at character {error.start}; fix the escape."
        ) from None
    return value


def split_text(text: str, val_fraction: float) -> tuple[str, str]:
    """Cuts off the last share of the characters for validation.

    Args:
        text: n characters.
        val_fraction: f, between 0 and 1, as the decimal that it was written as.

    Returns:
        (training, validation): the first floor(n (1 - f)) characters, and the rest.

    Raises:
        InputError: one of them would be empty, or white space alone.
    """
    end = _training_share(len(text), val_fraction)
    train, val = text[:end], text[end:]
    for part, name, change in ((train, "training", "lower"), (val, "validation", "raise")):
        if not part.strip():
            got = "nothing but white space" if part else "nothing"
            raise InputError(
                f"data.val_fraction={val_fraction} leaves a split empty: of {len(text)} characters, {name} got {got}; "
                f"{change} it, or give more text."
            )
    return train, val


def split_documents(documents: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Keeps the last share of the characters for validation, in whole documents; a lone document is cut in two.

    Args:
        documents: one or more texts.
        val_fraction: between 0 and 1.

    Returns:
        (training, validation): the documents that end within the first floor(n (1 - f)) characters, but at least one
        and not all; and the rest.

    Raises:
        InputError: no documents, or one that is too short to cut.
    """
    if not documents:
        raise InputError("there is no document to split.")
    if len(documents) == 1:
        train, val = split_text(documents[0], val_fraction)
        return [train], [val]
    left = _training_share(sum(map(len, documents)), val_fraction)
    count = 0
    for document in documents:
        left -= len(document)
        if left < 0:
            break
        count += 1
    count = min(max(count, 1), len(documents) - 1)
    return list(documents[:count]), list(documents[count:])


def _training_share(n: int, val_fraction: float) -> int:
    # Through the decimal: in binary 10 * (1 - 0.9) is a little below 1, and its floor would be 0.
    return math.floor(n * (1 - Fraction(str(float(val_fraction)))))


def _documents(file: Path) -> Iterator[str]:
    if file.suffix != ".jsonl":
        yield read_text(file)
        return
    for place, record in json_lines(file):
        if not isinstance(record, dict) or "text" not in record:
            raise InputError(f'{place}: expected an object with a "text" field, found {kind_of(record)}.')
        yield checked_text(record["text"], place, "text")


def kind_of(value: Any) -> str:
    """A JSON value's type in JSON's words; an object with its fields."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, value)) or 'no fields'}"
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
