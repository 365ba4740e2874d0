from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
PATIENCE = 400.0  # seconds, for what takes a few on a machine that is not busy
FAKES = [CHECKOUT, HERE / "fakes", HERE.parent / "stages" / "fakes"]


def running(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that `pid` has started, and those that they have."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(status.parent.name)
            found += [child, *descendants(child)]
    return found


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def processes() -> SimpleNamespace:
    """Looking at processes: running(pid), descendants(pid), listening(port), wait_until(condition, seconds), and
    patience, the seconds to wait for what must happen."""
    return SimpleNamespace(
        running=running, descendants=descendants, listening=listening, wait_until=wait_until, patience=PATIENCE
    )


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@dataclass
class Scenario:
    """A process that runs the steps of scenario.py on a Prefect home of its own."""

    home: Path
    root: Path
    process: subprocess.Popen[str] | None = None

    def start(self, *steps: dict[str, Any], **env: str) -> subprocess.Popen[str]:
        self.root.mkdir(parents=True, exist_ok=True)
        config = self.root / "probe.yaml"
        config.write_text("train: {steps: 2}\n")
        self.temporary.mkdir(exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.process = subprocess.Popen(
            [sys.executable, HERE / "fakes" / "scenario.py", self.root, config, *map(json.dumps, steps)],
            env={
                **clean,
                "PREFECT_HOME": str(self.home),
                "PYTHONPATH": os.pathsep.join(map(str, FAKES)),
                "TMPDIR": str(self.temporary),
                **env,
            },
            cwd=self.root,
            start_new_session=True,  # a signal to its group is for it and for what stays in the group
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    @property
    def temporary(self) -> Path:
        """Where its processes put temporary files."""
        return self.root.parent / "temporary"

    def servers(self) -> dict[int, int]:
        """Process number and port of each temporary server of the process."""
        assert self.process is not None
        found = {}
        for pid in descendants(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "uvicorn" in words:
                found[pid] = int(words[words.index("--port") + 1])
        return found

    def asleep(self, stage: str) -> int:
        """The process number of a stage that sleeps."""

        def pid() -> int:
            for file in self.root.glob(f"store/{stage}-*/pids.part"):
                text = file.read_text()
                return int(text) if text else 0
            return 0

        assert self.process is not None
        assert wait_until(lambda: pid() or self.process.poll() is not None, PATIENCE)
        assert self.process.poll() is None, self.process.communicate()
        return pid()

    def end(self) -> None:
        """Leaves nothing behind, also when a test has failed."""
        if self.process is not None and self.process.poll() is None:
            for pid in [self.process.pid, *descendants(self.process.pid)]:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
            self.process.communicate()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of Prefect's own database."""
        with sqlite3.connect(self.home / "prefect.db") as database:
            return database.execute(query).fetchall()


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory) -> Path:
    """One for all: making its database costs 15 s."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def make_scenario(prefect_home):
    made = []

    def make(root: Path) -> Scenario:
        made.append(Scenario(prefect_home, root))
        return made[-1]

    yield make
    for scenario in made:
        scenario.end()


@pytest.fixture
def scenario(make_scenario, tmp_path):
    made = make_scenario(tmp_path / "root")
    yield made
    made.end()
