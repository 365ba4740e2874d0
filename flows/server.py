"""No Prefect server is left behind, and none that dies stops a run.

With no server configured Prefect starts one of its own and stops it when Python exits, which does not happen when the
process is killed. So a tiny guard process is told the server's number over a pipe; when the pipe closes, however our
process ended, the guard, guard.py, stops what is left. Server and guard have sessions of their own: Ctrl-C, or a
SIGTERM to our process group, ends the flow first, which then tells the server how it ended.

A process that serves flows gives Prefect a folder for temporary files of its own, `temporary_folder`. Prefect leaves
some there when it is killed; the guard removes the folder once no process is left that was told of it.

A temporary server that dies is started again on its port, so that the run is reported all the same. One that is not
ours is waited for at the end of the flow.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from prefect.server.api.server import SubprocessASGIServer

_REVIVALS = 3  # of a temporary server, in one flow
_ASKED_TO_END = (0, -signal.SIGINT, -signal.SIGTERM)  # exit codes of a server that was: it stays away

WAIT = "JAXLM_REPORT_SECONDS"  # how long a flow that is done waits for a server that is away
WAIT_SECONDS = 60.0
WAIT_SECONDS_DEPLOYED = 600.0  # nobody sits before it, and what is not reported now stays "Running"
_PROBE_SECONDS = 10.0  # a busy machine may take some for an answer; one that is gone refuses at once

_watching = threading.Lock()  # held while a thread of this process watches over its server
_ours: ContextVar[bool] = ContextVar("ours", default=False)  # this process is a command of ours, which may end it


@contextmanager
def ends_with_us() -> Iterator[None]:
    """Inside the block, a temporary server that Prefect starts in this process is put under guard at once.

    Blocks may be nested, as those of a command, its flow and a chain are: one watches, lest each of them starts
    a server that died.
    """
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is not None or not _watching.acquire(blocking=False):
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer

    stop = threading.Event()
    server = SubprocessASGIServer()  # the one of this process: Prefect keeps one per port
    thread = threading.Thread(target=_report, args=(server, stop), name="server guard", daemon=True)
    try:
        _apart(server)
        thread.start()
        yield
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join(timeout=5.0)
        _watching.release()


def _apart(server: SubprocessASGIServer) -> None:
    """Lets `server` start in a session of its own. Prefect has no option for that: its function gets another Popen."""
    start = type(server)._run_uvicorn_command
    popen = functools.partial(subprocess.Popen, start_new_session=True)
    names = {**start.__globals__, "subprocess": SimpleNamespace(Popen=popen)}
    setattr(server, start.__name__, MethodType(FunctionType(start.__code__, names), server))


def _report(server: SubprocessASGIServer, stop: threading.Event) -> None:
    told, revived = 0, 0
    while True:
        process = server.server_process
        if process is not None and process.pid != told:
            told = process.pid
            with suppress(OSError):
                _guard().write(f"{told}\n".encode())
        elif (
            process is not None
            and process.poll() not in (None, *_ASKED_TO_END)
            and revived < _REVIVALS
            and process is server.server_process  # Prefect has not just stopped it
        ):
            revived += 1
            server.server_process = server._run_uvicorn_command()  # on the port that the clients know
            continue
        if stop.wait(0.05):
            return


def api_url() -> str | None:
    """The URL of the API in use; None before a temporary server has started."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if url is not None:
        return str(url)
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    return server.api_url if server.port is not None else None


def away() -> bool:
    """Whether the API, having been there, does not answer. One quick question; no retries."""
    import httpx

    url = api_url()
    if url is None:
        return False
    try:
        return httpx.get(f"{url.rstrip('/')}/health", timeout=_PROBE_SECONDS).status_code >= 500
    except httpx.HTTPError:
        return True


def seconds_to_wait() -> float | None:
    """What the environment says of the wait at the end of a flow; None where it says nothing.

    Raises:
        InputError: it is no number of seconds.
    """
    text = os.environ.get(WAIT, "").strip()
    try:
        seconds = float(text or 0)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        from jaxlm.errors import InputError

        raise InputError(f"{WAIT}={text}: expected a number of seconds, such as 60.")
    return seconds if text else None


def wait_until_back(say: Callable[[str], None]) -> bool:
    """At the end of a flow: gives a server that is away the time to come back, so that the flow is reported as it is.

    Returns:
        Whether it is there.
    """
    if not away():
        return True
    from prefect.context import FlowRunContext

    context, asked = FlowRunContext.get(), seconds_to_wait()
    flow_run = None if context is None else context.flow_run  # prefect.runtime.deployment would ask the API
    deployed = flow_run is not None and flow_run.deployment_id is not None
    seconds = asked if asked is not None else WAIT_SECONDS_DEPLOYED if deployed else WAIT_SECONDS
    say(f"Prefect's API is away and the work is done; waiting up to {seconds:.0f} s for it, to report that.")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.5)
        if not away():
            return True
    return False


def has_assets() -> bool:
    """Whether the server has a page for assets: Prefect Cloud's has, the local one has not."""
    from prefect.events.worker import emit_events_to_cloud

    return emit_events_to_cloud()


def about_the_api(error: BaseException | None) -> bool:
    """Whether an exception, or one of those behind it, is a request to the API that failed."""
    import httpx

    return any(isinstance(link, httpx.HTTPError) or "ephemeral" in str(link).lower() for link in links(error))


def links(error: BaseException | None) -> list[BaseException]:
    """An exception and those that were being handled when it was raised."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def of_a_command() -> Iterator[None]:
    """Inside the block this process is a command of ours: see `leave_when_away`."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def leave_when_away(sentence: str, code: int) -> None:
    """Ends a command that was told to end, where the server is no longer there to be told: it may have got the same
    signal, and Prefect would try for minutes. Does nothing elsewhere, as in a notebook or a worker's process.
    """
    if _ours.get() and away():
        print(f"jaxlm: {sentence}", file=sys.stderr)
        leave(code)


def leave(code: int) -> NoReturn:
    """Ends this process without Prefect's last attempts to deliver events to a server that is away."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def temporary_folder() -> Iterator[None]:
    """Inside the block, temporary files of this process and of those that it starts go to a folder that goes with them.

    Not for what other threads do at the same time: the environment is the process's.
    """
    folder, before = tempfile.mkdtemp(prefix="jaxlm-flows-"), os.environ.get("TMPDIR")
    _guard().write(f"{folder}\n".encode())
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = None  # looked for anew
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


@functools.cache
def _guard() -> _Pipe:
    """The guard of this process. It ends when the process does."""
    return _Pipe(
        subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))],
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
