"""How a loop learns that it must stop, and tells what would be lost if it were stopped at once."""

from __future__ import annotations

from collections.abc import Callable


class Interrupted(Exception):
    """An evaluation was broken off because the run has been asked to stop."""


class Stop:
    """Whether a run has been asked to stop. This one only ever says what it is told to say.

    Attributes:
        asked: True as soon as the run has been asked.
    """

    def __init__(self, asked: Callable[[], bool] = lambda: False) -> None:
        self._asked = asked

    @property
    def asked(self) -> bool:
        """Whether the run has been asked to stop."""
        return self._asked()

    def check(self) -> None:
        """For work that may be broken off between two of its parts.

        Raises:
            Interrupted: the run has been asked to stop.
        """
        if self.asked:
            raise Interrupted

    def leave_with(self, save: Callable[[], None] | None) -> None:
        """What another thread has to do before it may end this process, while the loop is busy for long.

        Args:
            save: puts all there is onto the disk; it must be safe to call beside what the loop does next. None: only
                the loop itself can, as while a step replaces the state.
        """


def nothing_to_save() -> None:
    """For `Stop.leave_with`: all that there is is on the disk."""
