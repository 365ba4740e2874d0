from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jaxlm.launch import Job

FAKES = Path(__file__).parent / "fakes"
STAGE_FAKES = Path(__file__).parent.parent / "stages" / "fakes"


@pytest.fixture
def make_job(tmp_path):
    def make(*command, name="pretrain-0123456789ab", processes=1, **env):
        directory = tmp_path / "store" / name
        directory.mkdir(parents=True, exist_ok=True)
        return Job(name, directory, tuple(map(str, command)) or ("true",), env, processes)

    return make


@pytest.fixture
def ended():
    """ended(launcher, handle, seconds) -> the status of a job that has ended within that time."""

    def wait(launcher, handle, seconds=60.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = launcher.poll(handle)
            if status.phase == "ended":
                return status
            time.sleep(0.05)
        raise AssertionError(f"{handle.id} has not ended: {status}")

    return wait


@pytest.fixture
def alive():
    def is_alive(pid):
        """Whether a process runs; one that is dead and not yet reaped does not."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return is_alive


@pytest.fixture
def fake_stages(monkeypatch):
    """Makes `fake_stage` importable here and in child processes."""
    monkeypatch.syspath_prepend(str(STAGE_FAKES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(STAGE_FAKES), os.environ.get("PYTHONPATH")])))
