"""The errors a user can cause or meet, each with the exit code that the command line and the flows rely on.

An error's text is one sentence: it names the file, field or line, says what was found, and what to do.
"""

from __future__ import annotations


class JaxlmError(Exception):
    """Base of every expected failure. `exit_code` is what a process ends with."""

    exit_code = 1


class InputError(JaxlmError, ValueError):
    """The input or the configuration is wrong (65, EX_DATAERR). Never retried."""

    exit_code = 65


class UnavailableError(JaxlmError):
    """The network, a peer or a service is away (69, EX_UNAVAILABLE). Worth a retry."""

    exit_code = 69


class DivergedError(JaxlmError):
    """Training diverged or a gate failed (70). A retry would do the same again."""

    exit_code = 70


class DiskError(JaxlmError):
    """The disk failed or is full (74, EX_IOERR)."""

    exit_code = 74


class Preempted(JaxlmError):
    """Stopped on request with everything saved (75, EX_TEMPFAIL): the same command continues."""

    exit_code = 75


BY_EXIT_CODE: dict[int, type[JaxlmError]] = {
    error.exit_code: error for error in (InputError, UnavailableError, DivergedError, DiskError, Preempted)
}
