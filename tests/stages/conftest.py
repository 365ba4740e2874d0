from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from jaxlm.config import load
from jaxlm.stages.spec import Spec

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture
def fake_modules(monkeypatch):
    """Makes `fake_stage` importable here and in child processes."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKES), os.environ.get("PYTHONPATH")])))


@pytest.fixture
def make_spec(tmp_path, fake_modules):
    def make(stage="fake", inputs=(), value=0, **options):
        return Spec(
            stage=stage,
            version=1,
            config={"value": value},
            inputs={item.stage: item.as_input() for item in inputs},
            options=options,
            root=str(tmp_path),
            module="fake_stage",
        )

    return make


@pytest.fixture
def eventually():
    def wait(condition, seconds=60.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.05)
        return False

    return wait


@pytest.fixture
def alive():
    def is_alive(pid):
        """Whether a process runs; one that is dead and not yet reaped does not."""
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state != "Z"

    return is_alive


@pytest.fixture
def letters(letters_run, tmp_path):
    """letters(*overrides) -> the configuration of the letters run, in a root of its own with what that run made."""
    shutil.copytree(letters_run.root / "store", tmp_path / "store", copy_function=shutil.copy2)
    return lambda *overrides: load(letters_run.config, overrides).replace(root=str(tmp_path))
