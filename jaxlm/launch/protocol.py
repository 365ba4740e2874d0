"""What a launcher is: submit a job and get a handle; poll it; cancel it with a grace; read its logs. Loads no jax.

A job is the process of one stage, or N of them that train together. The stage leaves its result and its sentence in
its directory, on a file system that the launcher's machine sees too; a launcher only starts, watches and ends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Phase = Literal["waiting", "running", "ending", "ended"]

# The environment by which the processes of one job find one another (`jaxlm.parallel.processes`).
COORDINATOR = "JAXLM_COORDINATOR"  # host:port of process 0
N_PROCESSES = "JAXLM_NUM_PROCESSES"
PROCESS_ID = "JAXLM_PROCESS_ID"

HANDLE_FILE = "launch.json"  # in the stage's directory, no part of its result


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        name: unique for the result that it makes: `<stage>-<id>`.
        directory: of the stage, absolute.
        command: the program and its arguments; each of the processes runs it.
        env: variables beside those of the machine that runs it.
        processes: how many train together.
        terminal: a local job may write to this process's terminal itself.
    """

    name: str
    directory: Path
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    terminal: bool = False


@dataclass(frozen=True)
class Handle:
    """A job that has been submitted: all that another process needs to find it again.

    Attributes:
        launcher: local, slurm or kubernetes.
        id: the number or name by which the launcher's system knows it.
        name: of the `Job`.
        directory: of the stage.
        place: the host, cluster or namespace.
        submitted: ISO time, UTC.
    """

    launcher: str
    id: str
    name: str
    directory: str
    place: str
    submitted: str

    def to_json(self) -> dict[str, str]:
        """For `launch.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Handle:
        """The reverse of `to_json`. Raises KeyError when a field is missing."""
        return cls(**{name: str(values[name]) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Status:
    """What a launcher knows of a job.

    Attributes:
        phase: waiting for machines, running, told to end and not to be gone on with, or ended.
        exit_code: of an ended job; None where nobody knows it (the machine went away with it).
        preempted: its machine was taken away: worth starting again from its checkpoint.
        cancelled: a person ended it: nothing is started again without being asked.
        reason: a sentence for people about why it waits or how it ended; may be empty.
    """

    phase: Phase
    exit_code: int | None = None
    preempted: bool = False
    cancelled: bool = False
    reason: str = ""


class Launcher(Protocol):
    """One object serves one job; its methods are called from one thread."""

    name: str
    poll_seconds: float  # a sensible time between two polls
    restarts: bool  # a job outlives the process that submitted it, and is found again by its handle

    def submit(self, job: Job) -> Handle:
        """Starts the job, or finds one of the same name that is under way.

        Raises:
            InputError: the job as described cannot run; nothing was started.
            UnavailableError: the system that starts jobs did not answer.
        """
        ...

    def poll(self, handle: Handle) -> Status:
        """How the job is.

        Raises:
            UnavailableError: the system has not answered for a while; the job may well be running.
        """
        ...

    def cancel(self, handle: Handle, grace: float) -> Status:
        """Asks the job to save and end, ends it after `grace` seconds, and returns when it has ended."""
        ...

    def logs(self, handle: Handle) -> list[str]:
        """The lines that the job has written since the last call."""
        ...


def process_id() -> int:
    """The number of this process among those of its job; 0 for a job of one. Under Slurm, srun has counted."""
    if n_processes() == 1:
        return 0
    return int(os.environ.get(PROCESS_ID) or os.environ.get("SLURM_PROCID") or 0)


def n_processes() -> int:
    """How many processes train together."""
    return int(os.environ.get(N_PROCESSES) or 1)
