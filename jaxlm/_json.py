"""Reading a JSON object, with the file named in every error. Loads no jax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxlm.errors import DiskError, InputError


def unreadable(path: Path, error: OSError) -> DiskError:
    """What is said of a file that is there and cannot be read: never that it is missing or damaged."""
    return DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and the permissions.")


def read_json(path: Path, *, hint: str = "") -> dict[str, Any]:
    """A JSON object.

    Args:
        path: the file.
        hint: what to do when it is missing or damaged; ends the sentence.

    Raises:
        InputError: no such file, or not a JSON object; names the file.
        DiskError: the file cannot be read.
    """
    ending = f"; {hint}." if hint else "."
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file{ending}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({' '.join(str(error).split())}){ending}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}{ending}")
    return value
