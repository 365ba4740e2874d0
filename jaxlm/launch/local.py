"""Processes on this machine: one, or N that train together over loopback. They end when their launcher does."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from jaxlm.launch.protocol import COORDINATOR, N_PROCESSES, PROCESS_ID, Handle, Job, Status

PEER_GRACE = 10.0  # seconds that the others have for ending after one of N processes has failed
_DRAIN = 5.0  # seconds for the last lines of processes that have ended

Child = subprocess.Popen[bytes]


class LocalLauncher:
    """Starts each process in a session of its own, so that Ctrl-C reaches the launcher alone.

    The job must look after its own end when the launcher is killed (`jaxlm.stages.process.follow_parent`): no handle of
    a local job is of use to another process.
    """

    name = "local"
    restarts = False
    poll_seconds = 0.1

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._readers: list[threading.Thread] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._first_bad: Child | None = None
        self._peers_until = 0.0

    def submit(self, job: Job) -> Handle:
        """Starts the processes of `job`: all of them, or none."""
        address = f"127.0.0.1:{_free_port()}"
        try:
            for number in range(job.processes):
                self._start(job, number, address)
        except BaseException:
            self._signal(signal.SIGKILL)
            self._clean_up()
            raise
        return Handle(
            launcher=self.name,
            id=" ".join(str(child.pid) for child in self._children),
            name=job.name,
            directory=str(job.directory),
            place=socket.gethostname(),
            submitted=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def poll(self, handle: Handle) -> Status:
        """Running until every process has ended; when one of N fails, the others are ended too."""
        codes = [child.poll() for child in self._children]
        if self._first_bad is None:
            self._first_bad = next((c for c, code in zip(self._children, codes, strict=True) if code), None)
            if self._first_bad is not None:
                self._peers_until = time.monotonic() + PEER_GRACE
                self._signal(signal.SIGTERM)
        if None in codes:
            if self._first_bad is not None and time.monotonic() > self._peers_until:
                self._signal(signal.SIGKILL)
            return Status("running")
        self._clean_up()
        code = self._first_bad.returncode if self._first_bad else 0
        return Status("ended", exit_code=code)

    def cancel(self, handle: Handle, grace: float) -> Status:
        """SIGTERM, and SIGKILL after `grace` seconds or at the next interruption."""
        self._signal(signal.SIGTERM)
        try:
            end = time.monotonic() + grace
            for child in self._children:
                child.wait(timeout=max(0.0, end - time.monotonic()))
        except BaseException:  # the time is over, or someone pressed Ctrl-C again
            self._signal(signal.SIGKILL)
        for child in self._children:
            child.wait()
        self._clean_up()
        codes = [child.returncode for child in self._children]
        return Status("ended", exit_code=next((code for code in codes if code), 0))

    def logs(self, handle: Handle) -> list[str]:
        """What process 0 has written since the last call; nothing where it writes to the terminal."""
        lines = []
        with suppress(queue.Empty):
            while True:
                lines.append(self._lines.get_nowait())
        return lines

    def _start(self, job: Job, number: int, address: str) -> None:
        first = number == 0
        # One terminal, and one log of the stage: the other processes write to logs of their own.
        log = job.directory / ("log.txt" if first else f"log-{number}.txt.part")
        rank = {COORDINATOR: address, N_PROCESSES: str(job.processes), PROCESS_ID: str(number)}
        terminal = job.terminal and first
        child = subprocess.Popen(
            job.command,
            env={**os.environ, **job.env, **(rank if job.processes > 1 else {})},
            stdin=subprocess.DEVNULL,
            stdout=None if terminal else subprocess.PIPE,
            stderr=None if terminal else subprocess.STDOUT,
            start_new_session=True,
        )
        self._children.append(child)
        if child.stdout is not None:
            thread = threading.Thread(
                target=self._read, args=(child.stdout, log, first), name="stage output", daemon=True
            )
            thread.start()
            self._readers.append(thread)

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, number)

    def _clean_up(self) -> None:
        """Ends the helpers of processes that have ended: they would hold the pipes open, and outlive the job."""
        for child in self._children:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        for thread in self._readers:
            thread.join(timeout=_DRAIN)

    def _read(self, pipe: IO[bytes], log: Path, echo: bool) -> None:
        """Copies the lines of a process to its log, until the pipe is closed at its other end."""
        with ExitStack() as stack:
            stack.enter_context(pipe)
            file = None
            with suppress(OSError):  # a full disk must not block the process
                file = stack.enter_context(open(log, "ab", buffering=0))
            for raw in pipe:
                with suppress(OSError):
                    if file is not None:
                        file.write(raw)
                if echo:
                    self._lines.put(raw.decode(errors="replace").rstrip("\r\n"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
