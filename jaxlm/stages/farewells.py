"""What storage threads still say after the save that they worked for has failed and told why: not printed.

A save is many writes at once. When one fails, the checkpoint's writer raises, the stage says its one sentence and ends;
the other writes fail a little later, with nobody left to tell. They report by three ways, none of which Orbax closes:
`sys.excepthook`, `sys.unraisablehook` (TensorStore's threads, by `PyErr_WriteUnraisable`) and asyncio's logger ("Task
exception was never retrieved"). Anything else is printed as Python prints it. Loads no jax.
"""

from __future__ import annotations

import logging
import sys
from types import TracebackType

from jaxlm._disk import DISK_ERRNOS, os_errno


def silence() -> None:
    """Leaves this process's hooks and asyncio's logger without farewells; for a process that is a stage."""
    sys.excepthook, sys.unraisablehook = _excepthook, _unraisablehook
    logging.getLogger("asyncio").addFilter(_is_news)


def _is_farewell(error: BaseException | None) -> bool:
    """Whether a storage thread found its event loop gone, or the disk as full as the save's own error has told."""
    closed = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    return closed or os_errno(error) in DISK_ERRNOS


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not _is_farewell(error):
        sys.__excepthook__(kind, error, trace)


def _unraisablehook(unraisable: sys.UnraisableHookArgs, /) -> None:
    if not _is_farewell(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _is_news(record: logging.LogRecord) -> bool:
    """For asyncio's logger, which tells of a task whose exception nobody took."""
    return record.exc_info is None or not _is_farewell(record.exc_info[1])
