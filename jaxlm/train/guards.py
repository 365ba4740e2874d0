"""Guards beside the loop: they watch, and end a run that has gone wrong. They change no result."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from jaxlm.guards_config import GuardOptions

MIN_STEPS = 5  # before so many steps have been timed, nobody knows what a usual one takes
_POLL = 0.5  # seconds between two looks


class SpikeGuard:
    """Tells a loss that leaps above the usual.

    The losses it compares with are stored beside each checkpoint, so a run that was interrupted is judged as one that
    was not: the same step ends both.

    Args:
        options: `spike_factor` and `spike_window`.
        losses: the last ones before the first step, oldest first.
    """

    def __init__(self, options: GuardOptions, losses: Sequence[float] = ()) -> None:
        self._factor, self._window = options.spike_factor, options.spike_window
        self._losses = list(losses)[-self._window :]

    @property
    def losses(self) -> list[float]:
        """What a checkpoint must carry: nothing where there is no guard."""
        return list(self._losses)

    def usual(self, loss: float) -> float | None:
        """The median of the last losses when `loss` is a spike above it, else None; a spike is not remembered.

        Until `spike_window` losses have been seen there is nothing to compare with.
        """
        if self._factor == 0:
            return None
        if len(self._losses) == self._window:
            median = statistics.median(self._losses)
            if loss > self._factor * median:
                return median
        self._losses = [*self._losses, loss][-self._window :]
        return None


class Watchdog:
    """Calls `act` when a step does not end within `hang_factor` times the median step (and `hang_seconds`).

    A thread of its own looks twice a second, also while the main thread waits for a device. It counts its own looks and
    not the clock, so a machine that was suspended, or a process that was stopped, is not taken for one that hangs.

    Args:
        options: `hang_factor` and `hang_seconds`.
        act: gets a sentence about the step; called once, in the thread.
        poll: seconds between two looks; for tests.
    """

    def __init__(self, options: GuardOptions, act: Callable[[str], None], *, poll: float = _POLL) -> None:
        self._factor, self._least, self._act, self._poll = options.hang_factor, options.hang_seconds, act, poll
        self._limit: float | None = None
        self._step, self._median, self._looks = 0, 0.0, 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, step: int, seconds: Sequence[float]) -> None:
        """Step `step` is under way from now on.

        Args:
            step: counted from 1.
            seconds: what the last steps took.
        """
        if self._factor == 0 or len(seconds) < MIN_STEPS:
            return
        self._step, self._median, self._looks = step, statistics.median(seconds), 0
        self._limit = max(self._factor * self._median, self._least)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """No step is under way: an evaluation or a save may take its time."""
        self._limit = None

    def close(self) -> None:
        """Ends the thread."""
        self.rest()
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.wait(self._poll):
            limit = self._limit
            if limit is None:
                continue
            self._looks += 1
            if self._looks * self._poll > limit:
                self._limit = None
                self._act(
                    f"step {self._step} has not ended in {limit:.0f} s, where the usual step takes {self._median:.2g} s"
                )
