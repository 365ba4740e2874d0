"""One writer per directory: a lock that the operating system frees when its owner ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from jaxlm._disk import disk_errors
from jaxlm.errors import InputError

LOCK_FILE = ".lock"

# Exec closes these descriptors by itself (O_CLOEXEC, Python's default); a forked worker would keep a dead owner's lock
# alive, so a fork closes them too. This mirrors what the process owns, which is why it belongs to the module.
_held: set[int] = set()


def _close_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def dir_lock(directory: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Holds `directory` for this process alone until the block ends; the directory is made if it is missing.

    The lock is flock(2) on `directory/.lock`, in which the owner's process number, host and start time stand for the
    message only: a killed owner leaves no stale lock. It is not re-entrant: the second `dir_lock` of the same directory
    is refused in the same process too. Child processes do not inherit it.

    Args:
      directory: what to hold.
      wait: for another owner to end, where it is one that soon does; by default it is an error.

    Raises:
      InputError: another owner holds it (named), the directory may not be written, or its file system has no locks.
      DiskError: the disk failed.
    """
    folder = Path(directory).absolute()
    with disk_errors("take the lock", folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(f"{folder} is in use by {_owner(descriptor)}; wait for it or stop it") from None
        except OSError as error:
            raise InputError(f"{folder} cannot be locked: {error.strerror}; use a file system with locks") from error
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        with disk_errors("take the lock", folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        if descriptor in _held:  # else this is a forked child, in which it is closed already
            _held.remove(descriptor)
            os.close(descriptor)


def _owner(descriptor: int) -> str:
    """Who holds the lock, as far as the file tells: the owner may be between taking it and writing its name."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on host {owner['host']} since {owner['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"
