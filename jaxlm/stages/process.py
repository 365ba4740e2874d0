"""The frame of a stage: lock, inputs, the stage's own `run`, manifest, and an exit code with one sentence.

A stage module ends with `if __name__ == "__main__": process.main(run)` and is then a process of its own,
`python -m jaxlm.stages.<name> STAGE_DIR`, where STAGE_DIR holds a spec.json. Its `run(spec, inputs) -> results` writes
files into `spec.directory` and returns a small JSON dict. Loads no jax.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jaxlm._compiled import remove_damaged_of_environment
from jaxlm._disk import DISK_ERRNOS, os_errno
from jaxlm._lock import dir_lock
from jaxlm.errors import BY_EXIT_CODE, DiskError, InputError, JaxlmError, Preempted
from jaxlm.launch.protocol import n_processes, process_id
from jaxlm.stages import farewells, provenance
from jaxlm.stages.in_time import SIGNALS, ends_in_time
from jaxlm.stages.orphans import PARENT, follow_parent
from jaxlm.stages.orphans import Helpers as Helpers
from jaxlm.stages.spec import Manifest, Spec
from jaxlm.stages.store import (
    check,
    damage,
    digest,
    discard_damaged,
    read_manifest,
    read_spec,
    write_json,
    write_manifest,
)

StageRun = Callable[[Spec, Mapping[str, Manifest]], Mapping[str, Any]]

COPY_LOG = "JAXLM_COPY_LOG"  # set: standard output goes to log.txt too, for a launcher that left us the terminal

_STOPPED = "{}: stopped on request; run the same command to continue."


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, so that no `except Exception` on its way swallows it."""


def main(run: StageRun, argv: list[str] | None = None) -> NoReturn:
    """Runs a stage as this process and exits with the code of `jaxlm.errors`."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("expected one argument: the directory of the stage, with a spec.json in it.", file=sys.stderr)
        raise SystemExit(InputError.exit_code)
    directory = Path(arguments[0])
    follow_parent()
    farewells.silence()
    copied = COPY_LOG in os.environ and process_id() == 0
    stop = functools.partial(_leave, directory)
    with _log_copied_to(directory / "log.txt" if copied else None), ends_in_time(stop):
        code, sentence = _guarded(run, directory)
    if sentence:
        tell(directory, code, sentence)
    raise SystemExit(code)


def is_stage_process() -> bool:
    """Whether this process is a stage's own, by `main`, and may be ended as a whole."""
    return signal.getsignal(signal.SIGTERM) is _terminate


def execute(spec: Spec, run: StageRun) -> Manifest:
    """Runs a stage in the calling process and puts its manifest in place.

    A result that is whole already is left as it is: another launcher may have made it, and others may be reading it.

    Raises:
        InputError: the directory is in use, an input is missing or damaged, or the stage found its input wrong.
        JaxlmError: whatever the stage met.
    """
    if process_id() > 0:
        return _assist(spec, run)
    with dir_lock(spec.directory):
        manifest, _ = check(spec)
        if manifest is not None:
            return manifest
        damaged = discard_damaged(spec.directory)
        for sentence in damaged:
            print(sentence, flush=True)
        (spec.directory / "manifest.json").unlink(missing_ok=True)  # what follows may change its outputs
        inputs = {name: _input(spec, name) for name in spec.inputs}
        _check_files(spec)
        provenance.write(spec, inputs)
        started, clock = datetime.now(UTC), time.perf_counter()
        results = run(spec, inputs)
        if "notes" in results:  # what a reader of the result must know, as a training has it
            notes = [sentence.removeprefix(f"{spec.directory}{os.sep}") for sentence in damaged]
            results = {**results, "notes": [*notes, *results["notes"]]}
        seconds = time.perf_counter() - clock
        return write_manifest(spec, results, seconds=seconds, started=started, environment=provenance.environment())


def _assist(spec: Spec, run: StageRun) -> Manifest:
    """What the processes after the first do: they take part in the stage, and leave its directory to the first."""
    results = run(spec, {name: _input(spec, name) for name in spec.inputs})
    return Manifest(spec, {}, results, 0.0, {}, "", "", spec.directory)


def _input(spec: Spec, name: str) -> Manifest:
    """The manifest of an input, every byte of which has been compared with it: what is about to be read is right."""
    directory = spec.input_directory(name)
    if not (directory / "manifest.json").is_file():
        raise InputError(
            f"{directory / 'manifest.json'}: the input {name} of {spec.name} is not there; run its stage first."
        )
    manifest = read_manifest(directory)
    if problems := damage(manifest):
        # Who looks for a result trusts sizes and times, so what only its bytes tell must go before it is made again.
        problem = problems[0].rstrip(".")
        remove = "" if problem.endswith("missing") else "remove that file and "
        raise InputError(f"{problem}; {remove}run the stage {name} again.")
    return manifest


def _check_files(spec: Spec) -> None:
    """The user's files must still be those that the identity was made from. Checkpoints are verified when restored."""
    for field, expected in spec.config.get("files", {}).items():
        section, _, name = field.partition(".")
        path = spec.settings.get(section, {}).get(name)
        if name in ("path", "name") and path is not None and digest(Path(path)) != expected:
            raise InputError(f"{field}={path}: the file has changed since the run was planned; run the command again.")


def _guarded(run: StageRun, directory: Path) -> tuple[int, str]:
    """Runs the stage. Returns the exit code, and a sentence when it is not 0.

    Requests to stop are heard inside and nowhere else: before, the system ends the process; after, it is ending.
    """
    try:
        try:
            signal.signal(signal.SIGTERM, _terminate)
            remove_damaged_of_environment()
            execute(read_spec(directory), run)
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        return 0, ""
    except (KeyboardInterrupt, Terminated):
        return Preempted.exit_code, _STOPPED.format(directory.name)
    except BaseException as error:  # SystemExit of a library is as unexpected as any exception
        return failure(directory, error)


def failure(directory: Path, error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for what a stage failed with. The traceback of a bug goes to traceback.txt."""
    if isinstance(error, JaxlmError):
        return error.exit_code, str(error)
    if os_errno(error) in DISK_ERRNOS:
        return DiskError.exit_code, f"{directory}: the disk failed ({_first_line(error)}); free some space."
    with suppress(OSError):
        text = "".join(traceback.format_exception(error))
        (directory / "traceback.txt").write_text(text, encoding="utf-8")
    kind = type(error).__name__
    return 1, f"{directory.name}: unexpected {kind} ({_first_line(error)}); see {directory / 'traceback.txt'}."


def _leave(directory: Path) -> NoReturn:
    """The end of a stage whose main thread has no time for a request to stop. The next process takes up what is left.

    Whoever trains has saved by then, in `jaxlm.stages.stopping`; other stages have nothing to save. Standard output is
    not flushed: the main thread may hold it, in a write that nobody reads.
    """
    tell(directory, Preempted.exit_code, _STOPPED.format(directory.name))
    os._exit(Preempted.exit_code)


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "").strip() or "no message"
    return text if len(text) <= 200 else text[:199] + "…"


def tell(directory: Path, code: int, sentence: str) -> None:
    """Leaves the sentence for the launcher, which prints it; without a launcher, prints it here."""
    try:
        # Of processes that train together, the first to fail tells why; the others are ended for that.
        if n_processes() == 1 or not (directory / "error.json").exists():
            write_json(directory / "error.json", {"exit_code": code, "message": sentence})
        told = PARENT in os.environ
    except (OSError, JaxlmError):
        told = False
    if not told:
        print(sentence, file=sys.stderr, flush=True)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


class _Copied:
    """A text stream whose lines go to a file too."""

    def __init__(self, stream: TextIO, copy: TextIO) -> None:
        self._stream, self._copy = stream, copy

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._copy.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _log_copied_to(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    stream = sys.stdout
    with open(path, "a", encoding="utf-8", buffering=1) as copy:
        sys.stdout = _Copied(stream, copy)
        try:
            yield
        finally:
            sys.stdout = stream


def read_error(directory: Path, code: int) -> JaxlmError:
    """The error with which a stage's process ended, from its exit code and what it left in error.json."""
    try:
        left = json.loads((directory / "error.json").read_text(encoding="utf-8"))
        if left["exit_code"] == code:
            return BY_EXIT_CODE.get(code, JaxlmError)(left["message"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if -code in (signal.SIGTERM, signal.SIGINT):  # while it was still being loaded, before it could listen
        return Preempted(f"{directory.name}: stopped on request before it began; run the same command to continue.")
    if code < 0:
        how = f"was killed by {_signal_name(-code)}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
        return JaxlmError(f"{directory.name}: {how}; run the same command to continue (log: {directory / 'log.txt'}).")
    return BY_EXIT_CODE.get(code, JaxlmError)(
        f"{directory.name}: ended with exit code {code} (log: {directory / 'log.txt'})."
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
