"""What a killed process leaves behind, and who removes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]

# The child outlives its parent by the time it takes the test to end it, and writes where Prefect's own do.
SERVES = """
import subprocess, sys, tempfile, time
from flows import server
with server.temporary_folder():
    tempfile.mkdtemp(prefix="prefect-")
    wait = [sys.executable, "-c", "import sys, tempfile; tempfile.mkdtemp(); print(1, flush=True); sys.stdin.read()"]
    child = subprocess.Popen(wait, stdin=sys.stdin, stdout=sys.stdout)
    {then}
"""


def folders(temporary: Path) -> list[Path]:
    return sorted(temporary.iterdir())


def until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def serving(tmp_path, then):
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SERVES.format(then=then)], env=env, **pipes)
    assert process.stdout.readline() == b"1\n"
    return process


def test_after_sigkill_the_folder_goes_when_its_last_user_does(tmp_path):
    process = serving(tmp_path, "time.sleep(600)")
    (folder,) = folders(tmp_path)
    assert len(folders(folder)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)
    assert folders(tmp_path) == [folder]  # the child may still need it
    process.stdin.close()
    assert until(lambda: not folders(tmp_path))
    process.stdout.close()


def test_after_a_plain_end_it_is_gone_as_well(tmp_path):
    process = serving(tmp_path, "child.stdin = None; sys.stdin.close(); child.wait()")
    assert len(folders(tmp_path)) == 1
    process.communicate(b"\n")
    assert process.returncode == 0
    assert until(lambda: not folders(tmp_path))
