"""Writing so that a crash leaves the old or the new, and a disk's failure told in one sentence."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jaxlm.errors import DiskError, InputError, JaxlmError

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
# TensorStore puts the number of the operating system's error into the text of its own exceptions.
_OS_ERROR_TEXT = re.compile(r"\[OS error (\d+)|os_error_code='(\d+)'")


def free_bytes(directory: Path) -> int:
    """Bytes that this user can still write below `directory`, or below its nearest parent that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free


def os_errno(error: BaseException | None) -> int | None:
    """The operating system's number behind an exception, looked for in its text, its causes and its members."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno is not None:
            return current.errno
        if match := _OS_ERROR_TEXT.search(str(current)):
            return int(match[1] or match[2])
        queue += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
    return None


@contextmanager
def disk_errors(doing: str, directory: Path) -> Iterator[None]:
    """Turns the failures of a disk inside the block into a sentence: "cannot {doing} in {directory}: why".

    Raises:
      DiskError: no space, over quota, file too large, read-only file system or an I/O error; names the free bytes.
      InputError: `directory` may not be written by this user, or is not a directory.
    """
    try:
        yield
    except JaxlmError:
        raise
    except Exception as error:
        number = os_errno(error)
        if number in DISK_ERRNOS:
            raise DiskError(
                f"cannot {doing} in {directory}: {os.strerror(number)} "
                f"({free_bytes(directory):,} bytes are free there); make room or choose another disk"
            ) from error
        if number in _ACCESS_ERRNOS:
            raise InputError(
                f"cannot {doing} in {directory}: {os.strerror(number)}; choose a directory that you can write"
            ) from error
        raise


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Puts `data` into `path`; at any moment a reader, or a crash, sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed process left is used again
    while True:
        with open(temporary, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, temporary):  # another writer had it and has put it in place
                continue
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
            break
    sync_directory(path.parent)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
