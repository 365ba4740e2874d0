"""A job is started once: its handle is kept in the stage's directory, and who comes later goes on with that job.

The handle is written right after the job was submitted. A launcher that died between the two is no danger: jobs on a
cluster carry a name that belongs to their result, and `submit` takes over a job of that name (Slurm finds it, and
Kubernetes refuses a second one).
"""

from __future__ import annotations

import json
from pathlib import Path

from jaxlm._disk import write_atomic
from jaxlm._lock import dir_lock
from jaxlm.errors import InputError
from jaxlm.launch.protocol import HANDLE_FILE, Handle, Job, Launcher


def kept(directory: Path) -> Handle | None:
    """The handle in a stage's directory, or None.

    Raises:
        InputError: the file is there and is not one.
    """
    file = directory / HANDLE_FILE
    try:
        return Handle.from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{file}: not the handle of a job; see whether one is running, delete the file and run again."
        ) from None


def submit_once(launcher: Launcher, job: Job) -> tuple[Handle, bool]:
    """The handle of the one job that makes this result: of the one under way, else of a new one.

    Returns:
        The handle, and whether the job was there already.

    Raises:
        InputError: the job cannot run, another process is just starting it, or a job of this result runs elsewhere.
        UnavailableError: the system that starts jobs, or that knows of the one started before, did not answer.
    """
    with dir_lock(job.directory / "launch"):
        before = kept(job.directory)
        if before is not None and before.launcher not in ("local", launcher.name):
            raise InputError(
                f"{job.directory / HANDLE_FILE}: this result is being made by the {before.launcher} job "
                f"{before.id}, and launch.kind={launcher.name}; wait for it or cancel it, then delete the file."
            )
        if before is not None and launcher.restarts and launcher.poll(before).phase in ("waiting", "running"):
            return before, True
        handle = launcher.submit(job)
        write_atomic(job.directory / HANDLE_FILE, json.dumps(handle.to_json(), indent=1).encode())
        return handle, False


def forget(directory: Path) -> None:
    """Takes the handle of an ended job away."""
    (directory / HANDLE_FILE).unlink(missing_ok=True)
