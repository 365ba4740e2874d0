"""Running a stage, or a chain of them, from a process that need not load jax.

A stage runs as a child process in a session of its own: its output is passed on, its metrics are read while they grow,
and it never outlives the launcher. A stage whose result is in the store already is not run again.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import IO, Any, Literal

from jaxlm.config import RunConfig
from jaxlm.errors import InputError, Preempted
from jaxlm.stages import runs
from jaxlm.stages.plan import plan, until
from jaxlm.stages.process import COPY_LOG, PARENT, Terminated, execute, read_error
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import check, write_spec

Launcher = Literal["process", "inline"]
OnMetrics = Callable[[dict[str, Any]], None]
Echo = Callable[[str], None]

GRACE = 25.0  # seconds for an emergency save, between SIGTERM and SIGKILL; Prefect's own grace is 30
POLL = 0.1  # seconds between two looks at a child


def say(line: str) -> None:
    """Prints a line at once: the default `echo`."""
    print(line, flush=True)


def run_stage(
    spec: Spec,
    *,
    launcher: Launcher = "process",
    on_metrics: OnMetrics | None = None,
    echo: Echo | None = None,
    grace: float = GRACE,
) -> tuple[Manifest, bool]:
    """The result of `spec`: from the store when it is there and whole, else by running the stage.

    Args:
        spec: what to run.
        launcher: "process" starts `python -m <module> STAGE_DIR`; "inline" runs the stage in the calling process.
        on_metrics: called, from a thread, with every record of the stage's metrics.jsonl while it runs. After the stage
            has resumed from a checkpoint, earlier records come again. What it raises is ignored: reporting never fails
            a training.
        echo: takes the stage's output, line by line. None: the stage writes to this process's terminal, or its lines
            are printed where there is none. In both cases they go to log.txt in the stage's directory too.
        grace: seconds that the stage has for saving when this call is interrupted.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        JaxlmError: the stage failed; the class tells by its exit code how, the text is the stage's own sentence.
        BaseException: whatever interrupted the call (KeyboardInterrupt, a signal handler's exception): the stage has
            been told to save and has ended when this is raised, and its sentence is the exception's note.
    """
    manifest, _ = check(spec)
    if manifest is not None:
        return manifest, True
    directory = write_spec(spec).resolve()
    with _metrics_followed(directory / "metrics.jsonl", on_metrics):
        if launcher == "inline":
            return execute(spec, importlib.import_module(spec.module_name).run), False
        _run_process(spec, directory, echo, grace)
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
            manifest, cached = run_stage(spec, launcher=cfg.launcher, echo=echo)
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


def _run_process(spec: Spec, directory: Path, echo: Echo | None, grace: float) -> None:
    """Runs the stage's process to its end and raises what it failed with."""
    for left in ("error.json", "traceback.txt"):
        (directory / left).unlink(missing_ok=True)
    terminal = echo is None and sys.stdout.isatty() and sys.stderr.isatty()
    env = {**os.environ, PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    if terminal:
        env[COPY_LOG] = "1"
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", spec.module_name, str(directory)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=None if terminal else subprocess.PIPE,
        stderr=None if terminal else subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which then lets the stage save
    )
    try:
        with _output_passed_on(child.stdout, directory / "log.txt", echo or say, child.pid):
            try:
                while child.poll() is None:
                    time.sleep(POLL)
            except BaseException as error:
                _stop(child, grace)
                if child.returncode != 0:
                    error.add_note(str(read_error(directory, child.returncode)))
                raise
    finally:
        _kill_group(child.pid)
        child.wait()
    if child.returncode != 0:
        raise read_error(directory, child.returncode)


def _stop(child: subprocess.Popen[bytes], grace: float) -> None:
    """SIGTERM to the child's group, and SIGKILL after `grace` seconds or at the next interruption."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=grace)
    except BaseException:  # the time is over, or someone pressed Ctrl-C again
        _kill_group(child.pid)
        child.wait()


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


@contextmanager
def _output_passed_on(pipe: IO[bytes] | None, log: Path, echo: Echo, group: int) -> Iterator[None]:
    """Copies the child's lines to the log and to `echo` from a thread, until the pipe is closed at its other end."""
    if pipe is None:
        yield
        return

    def copy() -> None:
        with ExitStack() as stack:
            file = None
            with suppress(OSError):  # a full disk must not block the child
                file = stack.enter_context(open(log, "ab", buffering=0))
            for raw in pipe:
                with suppress(OSError):
                    if file is not None:
                        file.write(raw)
                with suppress(Exception):
                    echo(raw.decode(errors="replace").rstrip("\r\n"))

    thread = threading.Thread(target=copy, name="stage output", daemon=True)
    thread.start()
    try:
        yield
    finally:
        _kill_group(group)  # helpers of a stage that died would hold the pipe open
        thread.join(timeout=5.0)


@contextmanager
def _metrics_followed(path: Path, on_metrics: OnMetrics | None) -> Iterator[None]:
    """Calls `on_metrics` with each new record, from a thread that starts with the caller's context variables."""
    if on_metrics is None:
        yield
        return
    tail, stop = MetricsTail(path), threading.Event()

    def follow() -> None:
        while True:
            ending = stop.is_set()
            for record in tail.new():
                with suppress(Exception):
                    on_metrics(record)
            if ending:
                return
            stop.wait(0.5)

    thread = threading.Thread(target=copy_context().run, args=(follow,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5.0)


class MetricsTail:
    """Reads what has been added to a metrics.jsonl since the last look; from its start when the file is a new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = -1

    def new(self) -> list[dict[str, Any]]:
        """The whole lines added since the last call, parsed. A missing file has none."""
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = []
        for line in whole.splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
        return [record for record in records if isinstance(record, dict)]
