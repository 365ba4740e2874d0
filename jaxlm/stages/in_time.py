"""A stage that is asked to stop ends in time, also while its main thread is deep in a library's code."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS = 5.0  # in which the main thread may come to a stop by itself; whoever asked waits for 20


@contextmanager
def ends_in_time(leave: Callable[[], None], seconds: float = SECONDS) -> Iterator[None]:
    """Inside the block, a thread ends the process when the main thread has not done so after SIGTERM or SIGINT.

    Python runs a signal's handler in the main thread and between two of its own instructions, so a compilation of a
    minute would hold it up for as long. What trains has a deadline of its own, which saves first:
    `jaxlm.stages.stopping`.

    Args:
        leave: ends the process; called in the thread.
        seconds: how long the main thread has.
    """
    hear, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # gets each signal's number at once
    over = threading.Event()

    def listen() -> None:
        number = -1
        while number not in (0, *SIGNALS):
            number = os.read(hear, 1)[0]
        if not over.wait(seconds):
            leave()

    thread = threading.Thread(target=listen, name="ends in time", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.write(tell, b"\0")
        thread.join()
        os.close(hear)
        os.close(tell)
