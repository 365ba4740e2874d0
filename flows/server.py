"""No Prefect server is left behind.

With no server configured Prefect starts one of its own and stops it when Python exits, which does not happen when the
process is killed. So a tiny guard process is told the server's number over a pipe; when the pipe closes, however our
process ended, the guard stops what is left. The guard is this file, run as a script on the standard library alone.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.server.api.server import SubprocessASGIServer

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


@contextmanager
def ends_with_us() -> Iterator[None]:
    """Inside the block, a temporary server that Prefect starts in this process is put under guard at once."""
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is not None:
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer

    stop = threading.Event()
    server = SubprocessASGIServer()  # the one of this process: Prefect keeps one per port
    thread = threading.Thread(target=_report, args=(server, stop), name="server guard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5.0)


def _report(server: SubprocessASGIServer, stop: threading.Event) -> None:
    told = 0
    while True:
        process = server.server_process
        if process is not None and process.pid != told:
            told = process.pid
            with suppress(OSError):
                _guard().write(f"{told}\n".encode())
        if stop.wait(0.05):
            return


@functools.cache
def _guard() -> _Pipe:
    """The guard of this process. It ends when the process does."""
    return _Pipe(
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the flow
        )
    )


class _Pipe:
    """The guard's standard input, and its Popen, which must live as long."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()


def _guard_main() -> None:
    watched = {}
    for line in sys.stdin:
        pid = int(line)
        watched[pid] = _started(pid)
    left = [pid for pid, started in watched.items() if started == _started(pid)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        end = time.monotonic() + _GRACE
        while left and time.monotonic() < end:
            left = [pid for pid in left if _exists(pid) and watched[pid] == _started(pid)]
            time.sleep(0.05)


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
    _guard_main()
