"""Running a stage, or a chain of them, from a process that need not load jax.

A stage runs as a process, or several, of a launcher (`jaxlm.launch`): its output is passed on, its metrics are read
while they grow, and on this machine it never outlives the launcher. A stage whose result is in the store already is not
run again.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from jaxlm.config import RunConfig
from jaxlm.errors import BY_EXIT_CODE, InputError, JaxlmError, Preempted, UnavailableError
from jaxlm.launch import Handle, Job, Status, for_stage, forget, submit_once
from jaxlm.launch import Launcher as JobLauncher
from jaxlm.launch.choose import processes
from jaxlm.launch_config import LaunchConfig
from jaxlm.stages import runs
from jaxlm.stages.metrics_tail import MetricsTail as MetricsTail
from jaxlm.stages.metrics_tail import OnMetrics, metrics_followed
from jaxlm.stages.plan import plan, until
from jaxlm.stages.process import COPY_LOG, PARENT, Terminated, execute, read_error
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import check, write_spec

Launcher = Literal["process", "inline"]
Echo = Callable[[str], None]


class StageTimeoutError(JaxlmError):
    """A stage took longer than it may. It has saved; a retry would take as long."""

    exit_code = Preempted.exit_code


class CancelledError(Preempted):
    """Somebody ended the job on its cluster: it is not started again without being asked."""


def say(line: str) -> None:
    """Prints a line at once: the default `echo`."""
    print(line, flush=True)


def run_stage(
    spec: Spec,
    *,
    launcher: Launcher = "process",
    launch: LaunchConfig | None = None,
    on_metrics: OnMetrics | None = None,
    echo: Echo | None = None,
    grace: float | None = None,
) -> tuple[Manifest, bool]:
    """The result of `spec`: from the store when it is there and whole, else by running the stage.

    Args:
        spec: what to run.
        launcher: "process" starts `python -m <module> STAGE_DIR`; "inline" runs the stage in the calling process.
        launch: what starts that process, and how many train together; None: one process on this machine.
        on_metrics: called, from a thread, with every record of the stage's metrics.jsonl while it runs. After the stage
            has resumed from a checkpoint, earlier records come again. What it raises is ignored: reporting never fails
            a training.
        echo: takes the stage's output, line by line. None: the stage writes to this process's terminal, or its lines
            are printed where there is none. In both cases they go to log.txt in the stage's directory too.
        grace: seconds that the stage has for saving when this call is interrupted; None: as `launch` says.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        JaxlmError: the stage failed; the class tells by its exit code how, the text is the stage's own sentence.
        UnavailableError: a service is away. Where it is the cluster's, the job goes on, and the next call with it.
        BaseException: whatever interrupted the call (KeyboardInterrupt, a signal handler's exception): the stage has
            been told to save and has ended when this is raised, and its sentence is the exception's note.
    """
    manifest, _ = check(spec)
    if manifest is not None:
        return manifest, True
    launch = launch or LaunchConfig()
    directory = write_spec(spec).resolve()
    with metrics_followed(directory / "metrics.jsonl", on_metrics):
        if launcher == "inline":
            return execute(spec, importlib.import_module(spec.module_name).run), False
        _run_process(spec, directory, launch, echo, launch.grace_seconds if grace is None else grace)
    manifest, problem = check(spec)
    if manifest is None:
        raise InputError(f"{spec.name}: the stage ended well but left no valid result ({problem}); run it again.")
    return manifest, False


def run_chain(
    cfg: RunConfig,
    *,
    last: str = "evaluate",
    config_name: str = "",
    echo: Echo | None = None,
    modules: dict[str, str] | None = None,
) -> list[tuple[Manifest, bool]]:
    """Runs `last` and the stages that it needs, in order, without Prefect, and points runs/<name> at them.

    Args:
        cfg: the run. Its `root`, `name` and `launcher` say where and how.
        last: the stage to end with.
        config_name: the configuration's file, for run.json.
        echo: takes every line of output. None: see `run_stage`; the summary lines are printed.
        modules: stage -> Python module, for stages other than the built-in ones.

    Returns:
        For each stage its manifest and whether it was there already.

    Raises:
        JaxlmError: a stage failed, or the call was interrupted (`Preempted`).
    """
    specs = until(plan(cfg, modules=modules), last)
    done: list[tuple[Manifest, bool]] = []
    with preempted_when_stopped():
        for spec in specs:
            manifest, cached = run_stage(spec, launcher=cfg.launcher, launch=cfg.launch, echo=echo)
            runs.record(cfg, config_name, manifest)
            (echo or say)(summary_line(manifest, cached))
            done.append((manifest, cached))
    return done


def summary_line(manifest: Manifest, cached: bool) -> str:
    """One line about a finished stage for people."""
    how = "already done" if cached else f"done in {manifest.seconds:.1f} s"
    return f"{manifest.stage:<13} {how:<18} {manifest.directory}"


@contextmanager
def preempted_when_stopped() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM inside the block into `Preempted`, with the sentence of the stage that was running.

    SIGTERM is handled only in the main thread, and only where nobody else handles it.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        raise Preempted(stopped_sentence(error)) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stopped_sentence(error: BaseException) -> str:
    """What the interrupted stage said when it ended, or a sentence of our own."""
    link: BaseException | None = error
    while link is not None:  # a handler on the way may have raised an exception of its own
        for note in getattr(link, "__notes__", ()):
            return str(note)
        link = link.__context__
    return "stopped on request; run the same command to continue."


def _raise_terminated(number: int, frame: Any) -> None:
    raise Terminated


def _run_process(spec: Spec, directory: Path, launch: LaunchConfig, echo: Echo | None, grace: float) -> None:
    """Runs the stage's process, or waits for the one that runs already, and raises what it failed with."""
    launcher = for_stage(launch, spec.stage)
    terminal = launcher.name == "local" and echo is None and sys.stdout.isatty() and sys.stderr.isatty()
    job = _job(spec, directory, launch, terminal=terminal, follow=launcher.name == "local")
    say_line = echo or say
    for left in ("error.json", "traceback.txt"):
        (directory / left).unlink(missing_ok=True)
    handle, there = submit_once(launcher, job)
    if launcher.restarts:
        say_line(f"{spec.stage}: {'goes on as' if there else 'is'} {launcher.name} job {handle.id}")
    try:
        status = _watched(launcher, handle, say_line, launch.timeout_hours * 3600.0)
    except UnavailableError:  # nobody knows how the job is: it goes on, and the next call goes on with it
        raise
    except BaseException as error:
        status = launcher.cancel(handle, grace)
        _pass_on(launcher, handle, say_line)
        if status.phase == "ended":
            forget(directory)
        if status.exit_code != 0:
            error.add_note(str(_failure(directory, status)))
        raise
    _pass_on(launcher, handle, say_line)
    forget(directory)
    if status.exit_code != 0:
        raise _failure(directory, status)


def _job(spec: Spec, directory: Path, launch: LaunchConfig, *, terminal: bool, follow: bool) -> Job:
    """The stage as a job. On another machine there is no launcher to follow, and the stage keeps its own log."""
    env = {"PYTHONUNBUFFERED": "1"}
    if follow:
        env |= {PARENT: str(os.getpid())} | ({COPY_LOG: "1"} if terminal else {})
    elif launch.kind == "kubernetes":
        env[COPY_LOG] = "1"
    python = sys.executable if launch.kind != "kubernetes" or follow else "python"  # an image has its own
    command = (python, "-u", "-m", spec.module_name, str(directory))
    return Job(spec.name, directory, command, env, processes(launch, spec.stage), terminal)


def _watched(launcher: JobLauncher, handle: Handle, echo: Echo, seconds: float) -> Status:
    """Polls the job to its end, and passes on what it writes.

    Raises:
        StageTimeoutError: it took longer than `seconds` (0: no limit).
    """
    end = time.monotonic() + seconds
    told = ""
    while True:
        status = launcher.poll(handle)
        _pass_on(launcher, handle, echo)
        if status.phase == "ended":
            return status
        if status.reason and status.reason != told:
            told = status.reason
            echo(told)
        if seconds and time.monotonic() > end:
            raise StageTimeoutError(
                f"{handle.name}: it has not ended after launch.timeout_hours={seconds / 3600:g}; it was told to save; "
                "raise the limit and run the same command to continue."
            )
        time.sleep(launcher.poll_seconds)


def _pass_on(launcher: JobLauncher, handle: Handle, echo: Echo) -> None:
    for line in launcher.logs(handle):
        with suppress(Exception):
            echo(line)


def _failure(directory: Path, status: Status) -> JaxlmError:
    """What a job that did not end well failed with: in its own words where it left some."""
    code = status.exit_code
    own = read_error(directory, code) if code is not None else None
    if status.cancelled:
        told = f"{own}" if own is not None and isinstance(own, Preempted) else f"{directory.name}: {status.reason}"
        return CancelledError(f"{told.rstrip('.')}; run the same command to continue.")
    if status.preempted:
        return own if isinstance(own, Preempted) else Preempted(f"{directory.name}: {status.reason}; run it again.")
    if own is None or (status.reason and not (directory / "error.json").exists()):
        kind = BY_EXIT_CODE.get(code or 1, JaxlmError)
        return kind(f"{directory.name}: {status.reason}; see {directory / 'log.txt'}.")
    return own
