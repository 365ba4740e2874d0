"""Requests to stop that come at awkward moments. What a training does about them is in tests/faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from jaxlm.errors import DiskError
from jaxlm.stages import orphans, process, stopping, store

ASKED = """
import os, signal, sys
from jaxlm.errors import InputError
from jaxlm.stages import process

def asked(*given):
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))

def run(spec, inputs):
    raise InputError("x.txt: no such file.")

if sys.argv[1] == "before":
    process.remove_damaged_of_environment = asked
else:
    tell = process.tell
    process.tell = lambda *given: (asked(), tell(*given))
process.main(run, sys.argv[2:3])
"""


@pytest.mark.parametrize(
    ("when", "number", "code", "sentence"),
    [
        ("before", "SIGTERM", 75, "fake-{id}: stopped on request; run the same command to continue.\n"),
        ("after", "SIGTERM", 65, "x.txt: no such file.\n"),  # it was ending anyway
        pytest.param(
            "before", "SIGINT", 75, "fake-{id}: stopped on request; run the same command to continue.\n",
            marks=pytest.mark.slow,
        ),
        pytest.param("after", "SIGINT", 65, "x.txt: no such file.\n", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_asked_just_before_and_just_after_the_work(make_spec, when, number, code, sentence):
    spec = make_spec()
    directory = store.write_spec(spec)
    done = subprocess.run([sys.executable, "-c", ASKED, when, directory, number], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, sentence.format(id=spec.id))


def test_of_processes_that_work_together_the_first_keeps_the_log(make_spec):
    """In a cluster each has COPY_LOG, and all of them share the directory."""
    directory = store.write_spec(make_spec())
    env = {**os.environ, process.COPY_LOG: "1", "JAXLM_NUM_PROCESSES": "2", "JAXLM_PROCESS_ID": "1"}
    done = subprocess.run([sys.executable, "-m", "fake_stage", directory], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "fake says write\n")
    assert not (directory / "log.txt").exists()


class Ended(BaseException):
    """Instead of the end of this process."""


@pytest.fixture
def own_process(monkeypatch):
    """This process passes for a stage's own; what would end it is listed."""
    before = signal.signal(signal.SIGTERM, process._terminate)
    ended = []

    def end(self, code, sentence):
        ended.append((code, sentence))
        raise Ended

    monkeypatch.setattr(stopping._Deadline, "_end", end)
    monkeypatch.setattr(stopping, "PATIENCE", 0.01)
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # of the thread that `Ended` has ended
    yield ended
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("alive", [True, False])
def test_a_launcher_that_asks_and_then_dies_has_asked_once(own_process, monkeypatch, tmp_path, alive):
    """The system's SIGTERM for the death of the launcher must not break off the save that the first one began."""
    monkeypatch.setenv(orphans.PARENT, str(os.getppid() if alive else os.getpid()))
    with stopping.stop_requested(tmp_path) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert stop._event.wait(60)
    expected = (75, f"{tmp_path.name}: stopped at once by a second request; run the same command again.")
    assert own_process == ([expected] if alive else [])


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (DiskError("the disk is full."), 74, "the disk is full."),
        (OSError(28, "No space left on device"), 74, "{}: the disk failed ([Errno 28] No space left on device); free"),
        (RuntimeError("a bug"), 1, "{0.name}: unexpected RuntimeError (a bug); see {0}/traceback.txt."),
    ],
)
def test_a_save_in_time_that_fails_ends_the_process_too(own_process, monkeypatch, tmp_path, error, code, sentence):
    def save():
        raise error

    with stopping.stop_requested(tmp_path) as stop:
        stop.leave_with(save)
        signal.raise_signal(signal.SIGTERM)
        stop._leaver.join(60)
    ((found, said),) = own_process
    assert found == code
    assert said.startswith(sentence.format(tmp_path))
    if code == 1:
        assert "RuntimeError: a bug" in (tmp_path / "traceback.txt").read_text()


class Held:
    """A standard output in which the main thread is stuck."""

    def flush(self):
        raise AssertionError("waits for ever")


def test_the_end_does_not_wait_for_standard_output(monkeypatch, tmp_path, capsys):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "stdout", Held())
    for leave in (lambda: process._leave(tmp_path), lambda: stopping._Deadline(tmp_path)._stopped("stopped")):
        with pytest.raises(Ended, match="75"):
            leave()
        assert json.loads((tmp_path / "error.json").read_text())["exit_code"] == 75


DISK_FULL = ValueError("UNAVAILABLE: Failed to flush file [OS error 27: File too large]")


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("Event loop is closed"), False), (DISK_FULL, False), (RuntimeError("another"), True)],
)
def test_only_a_storage_threads_farewell_is_not_printed(error, told):
    """By each of the three ways in which one arrives; in a process of its own, since the hooks are the process's."""
    ways = (
        "sys.excepthook(type(error), error, None)",
        "threading.Thread(target=unraisable).start()",
        "asyncio.run(forgotten())",
    )
    setup = f"""
import asyncio, gc, sys, threading
from jaxlm.stages import farewells

class Held:
    def __del__(self):
        raise error

def unraisable():
    Held()

async def failing():
    raise error

async def forgotten():
    task = asyncio.create_task(failing())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task
    gc.collect()

error = {type(error).__name__}({str(error)!r})
farewells.silence()
"""
    for way in ways:
        ended = subprocess.run([sys.executable, "-c", setup + way], capture_output=True, text=True, check=True)
        assert (str(error) in ended.stderr) == told, (way, ended.stderr)
        assert bool(ended.stderr) == told, (way, ended.stderr)
