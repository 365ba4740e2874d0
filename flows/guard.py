"""The process that ends what another leaves behind; see `flows.server`. A script on the standard library alone.

It reads lines, and acts when its standard input closes, which happens however the other process ended. A number is a
process: it is told to end, and made to. A path is a folder: it is removed once no process is left that was started
with it as its TMPDIR.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def main() -> None:
    watched, folders = {}, []
    for line in sys.stdin:
        if line.startswith("/"):
            folders.append(line.rstrip("\n"))
        else:
            watched[int(line)] = _started(int(line))
    left = [pid for pid, started in watched.items() if started == _started(pid)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        end = time.monotonic() + _GRACE
        while left and time.monotonic() < end:
            left = [pid for pid in left if _exists(pid) and watched[pid] == _started(pid)]
            time.sleep(0.05)
    for folder in folders:
        while _in_use(folder):
            time.sleep(0.5)
        shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: str) -> bool:
    """Whether a process was started with this folder for its temporary files, and lives."""
    told = f"TMPDIR={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if told in (process / "environ").read_bytes().split(b"\0"):
                return True
    return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _started(pid: int) -> str:
    """When a process started, where the system tells: another process may get the same number later."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


if __name__ == "__main__":
    main()
