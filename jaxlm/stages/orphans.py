"""A stage's process ends when its launcher has died, and its helpers end when it has. Loads no jax."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess

from jaxlm.errors import Preempted

PARENT = "JAXLM_PARENT"  # process number of the launcher: set, the stage ends when that process does
ORPHAN_GRACE = 30.0  # seconds that a stage whose launcher died has for saving

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Makes this process end when the launcher named in the environment has died: SIGTERM first, then SIGKILL.

    Linux sends the SIGTERM by itself, at once (`PR_SET_PDEATHSIG`); the thread serves other systems, and a process that
    does not react. Does nothing in a process that was started by hand.
    """
    launcher = os.environ.get(PARENT)
    if launcher is None:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if is_orphan():  # it died before the line above
        os._exit(Preempted.exit_code)
    threading.Thread(target=_watch, args=(int(launcher),), name="parent watch", daemon=True).start()


def is_orphan() -> bool:
    """Whether the launcher named in the environment has died. The system says so before it sends its SIGTERM."""
    launcher = os.environ.get(PARENT)
    return launcher is not None and os.getppid() != int(launcher)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    if not sys.platform.startswith("linux"):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE)
    # The launcher made this process the leader of its group: helpers of its own go with it.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(Preempted.exit_code)


class _Helper(SpawnProcess):
    def run(self) -> None:
        parent = parent_process()
        if parent is not None:
            threading.Thread(target=_end_after, args=(parent,), name="parent watch", daemon=True).start()
        super().run()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(Preempted.exit_code)


class Helpers(SpawnContext):
    """For a pool of a stage's helpers: spawned, for a forked child of a process with threads may hang, and each ends
    when the stage's process does, where a pool's own would wait for its next piece of work for ever."""

    Process = _Helper
