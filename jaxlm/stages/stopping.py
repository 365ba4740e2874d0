"""SIGTERM and SIGINT while a stage trains: the first asks it to save and end, the second ends it at once."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from jaxlm.errors import Preempted, UnavailableError
from jaxlm.stages import process
from jaxlm.stages.in_time import SIGNALS
from jaxlm.stages.orphans import is_orphan
from jaxlm.stages.runner import say
from jaxlm.train.stopping import Stop

PATIENCE = 3.0  # seconds in which the main thread may come to a stop by itself


@contextmanager
def stop_requested(directory: Path) -> Iterator[Stop]:
    """Tells the loop of SIGTERM and SIGINT while the block runs.

    In a stage's own process, a thread sees to it that the process ends in time even when the main thread is deep in a
    compilation, and that the second signal ends it at once; either way with code 75, and nothing is lost, because
    whatever a process leaves unfinished on the disk is passed over by the next. In any other process (a notebook's, a
    test's) the second signal does what it did before, and in a thread, which gets no signals, nothing is handled.

    Args:
        directory: of the stage, for the sentence it leaves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if process.is_stage_process():
        with _handled(dict.fromkeys(SIGNALS, _ignored), before), _Deadline(directory) as stop:
            yield stop
        return
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    with _handled(dict.fromkeys(SIGNALS, handle), before):
        yield Stop(asked.is_set)


class _Deadline(Stop):
    """Listens for the signals in a thread, which hears them also while the main thread is in a library's code."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._event, self._over = threading.Event(), threading.Event()
        super().__init__(self._event.is_set)
        self._save: Callable[[], None] | None = None
        self._lock = threading.Lock()  # held while this thread saves, so that the main thread does not go on meanwhile

    def leave_with(self, save: Callable[[], None] | None) -> None:
        with self._lock:
            self._save = save

    def __enter__(self) -> Stop:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # The interpreter writes each signal's number there at once; its handlers wait for the main thread.
        self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._leaver = threading.Thread(target=self._leave_in_time, name="stop in time", daemon=True)
        self._listener.start()
        self._leaver.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._over.set()
        self._event.set()
        os.write(self._pipe[1], b"\0")
        self._listener.join()
        self._leaver.join()
        for end in self._pipe:
            os.close(end)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._pipe[0], 64):
                if number == 0:
                    return
                if number not in SIGNALS:
                    continue
                # The death of the launcher is no second request: it has asked and gone, and there is time to save.
                if self._event.is_set() and not is_orphan():
                    self._stopped("stopped at once by a second request")
                self._event.set()

    def _leave_in_time(self) -> None:
        self._event.wait()
        while not self._over.wait(PATIENCE):
            with self._lock:
                if self._save is None or self._over.is_set():
                    continue
                try:
                    self._save()
                except Exception as error:  # whatever it is, a thread that died of it would let the process go on
                    self._end(*process.failure(self._directory, error))
                self._stopped("stopped on request, saved")

    def _stopped(self, how: str) -> NoReturn:
        self._end(Preempted.exit_code, f"{self._directory.name}: {how}; run the same command again.")

    def _end(self, code: int, sentence: str) -> NoReturn:
        process.tell(self._directory, code, sentence)
        os._exit(code)  # without a flush: the main thread may hold standard output, in a write that nobody reads


def _ignored(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the number to be written; the threads do the rest."""


@contextmanager
def _handled(
    handlers: dict[signal.Signals, Callable[..., None]], before: Mapping[signal.Signals, object]
) -> Iterator[None]:
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)  # type: ignore[arg-type]


def end_hung(directory: Path) -> Callable[[str], None]:
    """What the watchdog does: leaves the stacks of all threads in stacks.txt, and ends a stage's own process.

    Its code is 69, for what hangs is as a rule a peer or a device: a retry continues from the last checkpoint. In any
    other process nothing is ended, only said.
    """
    own = process.is_stage_process()

    def act(sentence: str) -> None:
        stacks = directory / "stacks.txt"
        with suppress(OSError), open(stacks, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        told = f"{directory.name}: {sentence}; see {stacks}, and run the same command to continue."
        if not own:
            say(told)
            return
        process.tell(directory, UnavailableError.exit_code, told)
        os._exit(UnavailableError.exit_code)

    return act
