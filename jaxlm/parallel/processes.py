"""Several processes that run the same program on one mesh: joining them, and deciding together.

Every process calls the functions of this module at the same places. In a process on its own they cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.errors import UnavailableError
from jaxlm.launch.protocol import COORDINATOR, n_processes, process_id

HEARTBEAT_SECONDS = 30  # a peer that is not heard for so long ends the others
SHUTDOWN_SECONDS = 30  # that one process waits for the others at the end
_CONNECT_SECONDS = 300


def connect() -> None:
    """Joins the other processes of this job, where there are any. Call it before jax has looked at its devices.

    Raises:
        UnavailableError: the first process cannot be reached.
    """
    if n_processes() == 1 or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            os.environ.get(COORDINATOR),
            n_processes(),
            process_id(),
            initialization_timeout=_CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        said = " ".join(str(error).split())[:200]
        raise UnavailableError(
            f"process {process_id()} of {n_processes()} cannot join the first one at "
            f"{os.environ.get(COORDINATOR)} ({said}); see whether that machine is reachable, and run it again."
        ) from None


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def as_the_first(value: bool) -> bool:
    """What the first process says, in all of them: for what hangs on a clock."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def asked_together() -> Callable[[], bool]:
    """A function that becomes True in every process at the same call, soon after one of them has got SIGTERM.

    jax listens for the signal in the place of Python's handlers, and agrees on the call with the other processes.
    """
    calls, asked = 0, False

    def reached() -> bool:
        nonlocal calls, asked
        calls += 1
        asked = asked or multihost_utils.reached_preemption_sync_point(calls)
        return asked

    return reached
