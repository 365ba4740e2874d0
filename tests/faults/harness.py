"""Faults for any stage: processes killed, stopped, signalled or held at a point, files damaged, disks that are full.

A stage runs as `python -m <module> STAGE_DIR`, in a process group of its own that ends with the `with` block, also when
the test fails. What happens inside a stage is never asked of the stage: `hold.py` wraps one of its functions from
outside, and what a directory holds tells the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHECKOUT = Path(__file__).resolve().parents[2]
HOLD = Path(__file__).with_name("hold.py")
PAGE = 4096


@dataclass(frozen=True)
class Hold:
    """Where a stage's process pauses: at the `call`-th call of `target` ("module:attribute") it makes `marker` and
    sleeps, then goes on. Its main thread is busy meanwhile, as it is in a compilation."""

    target: str
    marker: Path
    seconds: float = 60.0
    call: int = 1


@dataclass
class StageProcess:
    """The process of a stage; use it in a `with` block.

    Attributes:
        directory: of the stage, with its spec.json.
        module: what to run.
        env: changes to the environment.
        hold: a point at which it pauses.
        file_size: the largest file it may write, bytes: a disk that fills up.
    """

    directory: Path
    module: str
    env: Mapping[str, str] = field(default_factory=dict)
    hold: Hold | None = None
    file_size: int | None = None

    def __enter__(self) -> Self:
        words = [self.module, str(self.directory)]
        held: list[str] = []
        if self.hold is not None:
            held = [self.hold.target, str(self.hold.call), str(self.hold.marker), str(self.hold.seconds)]
        self.began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(HOLD), json.dumps([held, self.file_size]), *words]
            if held or self.file_size is not None else [sys.executable, "-m", *words],
            cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT), **self.env}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # helpers of the stage too
        self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> float:
        """Delivers a signal to the process alone; returns the time."""
        self._process.send_signal(number)
        return time.monotonic()

    def kill(self, timeout: float = 60.0) -> None:
        """kill -9 of the process alone; fails when a helper of it lives on, as it would on a user's machine."""
        self.send(signal.SIGKILL)
        self._process.wait()
        end = time.monotonic() + timeout
        while _lives(self._process.pid):
            assert time.monotonic() < end, "killed, and its helpers live on"
            time.sleep(0.01)

    def end(self, timeout: float = 240.0) -> tuple[int, str]:
        """Waits for the end: (exit code, standard error)."""
        error = self._process.communicate(timeout=timeout)[1]
        return self._process.returncode, error

    def until(self, there: Callable[[], Any], timeout: float = 240.0) -> Any:
        """Waits until `there()` is true, and returns what it said; fails when the process ends before."""
        end = time.monotonic() + timeout
        while not (found := there()):
            assert self.running, f"ended before: {self.end()}"
            assert time.monotonic() < end, f"not there after {timeout} s"
            time.sleep(0.005)
        return found

    def until_held(self) -> None:
        """Waits until the process has come to its hold."""
        assert self.hold is not None
        self.until(self.hold.marker.exists)


def _lives(group: int) -> bool:
    """Whether a process of the group still runs. The dead ones whom nobody has asked how they ended do not count."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


# A bigram table starts in a moment; what a fault meets is the same for every model.
CONFIG: dict[str, Any] = {
    "name": "faults",
    "data": {"n_stories": 60, "n_val_stories": 4, "seq_len": 32},
    "model": {"kind": "bigram", "max_seq_len": 256},
    "train": {
        "steps": 24, "batch_size": 4, "grad_accum_steps": 2, "learning_rate": 0.01, "log_every": 1, "eval_every": 8,
        "eval_rows": 4, "checkpoint_every": 3, "sample_tokens": 0,
    },
    "sft": {"n_examples": 60, "seq_len": 256, "train": {
        "steps": 9, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "eval_every": 4, "checkpoint_every": 2,
        "sample_tokens": 0,
    }},
    "eval": {"n_questions": 4, "max_new_tokens": 3, "n_samples": 0, "batch_size": 8},
}  # fmt: skip


class Chain:
    """The stages of CONFIG in a root of their own, where some of them are done."""

    def __init__(self, root: Path, env: Mapping[str, str], **overrides: Any) -> None:
        from jaxlm.config import RunConfig, validated
        from jaxlm.stages.plan import plan

        train = CONFIG["train"] | overrides.pop("train", {})
        self.cfg = validated(RunConfig, CONFIG | overrides | {"root": str(root), "train": train})
        self.root, self.env = root, env
        self.specs = {spec.stage: spec for spec in plan(self.cfg)}

    def process(self, stage: str, **options: Any) -> StageProcess:
        """The stage's process, not started yet."""
        from jaxlm.stages.store import write_spec

        spec = self.specs[stage]
        return StageProcess(write_spec(spec), spec.module_name, env=self.env, **options)

    def directory(self, stage: str) -> Path:
        return Path(self.specs[stage].directory)


# What a directory tells


def last_step(directory: Path) -> int:
    """The newest training step in metrics.jsonl; 0 when there is none."""
    with suppress(OSError):
        for line in reversed((directory / "metrics.jsonl").read_bytes().splitlines()):
            with suppress(ValueError):
                record = json.loads(line)
                if record.get("split") == "train":
                    return int(record["step"])
    return 0


def saved_steps(directory: Path) -> list[int]:
    """The steps under their final names in `checkpoints`."""
    return sorted(int(path.name) for path in directory.glob("checkpoints/*") if path.name.isdecimal())


def phase(directory: Path) -> str:
    """What a stage was doing when it ended, as far as its directory tells."""
    if (directory / "manifest.json").exists():
        return "done"
    if any(directory.glob("checkpoints/*.unfinished*")):
        return "saving"
    if any(directory.glob(".*.tmp")):
        return "writing a small file"
    if last_step(directory):
        return "training"
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if names - {"spec.json", ".lock", "provenance.json", "error.json"}:
        return "writing"
    return "working, nothing written yet" if ".lock" in names else "starting"


# Damage


def flip(path: Path, other: Path | None = None) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(data)


def zero(path: Path, other: Path | None = None) -> None:
    """One page, in the middle: what a torn write leaves."""
    data = bytearray(path.read_bytes())
    start = len(data) // 2 // PAGE * PAGE
    data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    path.write_bytes(data)


def truncate(path: Path, other: Path | None = None) -> None:
    """The last byte is gone."""
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path, other: Path | None = None) -> None:
    path.unlink()


def swap(path: Path, other: Path | None = None) -> None:
    """The file of another run in its place."""
    assert other is not None
    data = other.read_bytes()
    assert data != path.read_bytes()
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, Path | None], None]] = {
    "flip": flip, "zero": zero, "truncate": truncate, "remove": remove, "swap": swap,
}  # fmt: skip


class damaged:
    """`with damaged(path, "flip"):` damages a file and puts it back as it was. Size permitting, its time stays, as it
    does when a disk goes bad."""

    def __init__(self, path: Path, kind: str, other: Path | None = None) -> None:
        self._path, self._kind, self._other = path, kind, other

    def __enter__(self) -> None:
        self._data, self._times = self._path.read_bytes(), self._path.stat()
        DAMAGES[self._kind](self._path, self._other)
        if self._path.exists():
            os.utime(self._path, ns=(self._times.st_atime_ns, self._times.st_mtime_ns))

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._data)
        os.utime(self._path, ns=(self._times.st_atime_ns, self._times.st_mtime_ns))


# What came out


def outcome(directory: Path) -> dict[str, Any]:
    """What must be equal of two runs of a stage: everything but times, and the names that Orbax draws at random."""
    manifest = json.loads((directory / "manifest.json").read_text())
    out: dict[str, Any] = {
        f"file {name}": output["sha256"]
        for name, output in manifest["outputs"].items()
        if name not in _TIMES and not name.startswith(("checkpoints/", "tensorboard/", "report"))
    }
    results = {key: value for key, value in manifest["results"].items() if key not in _TIMED_RESULTS}
    out["results"] = hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()
    if (directory / "checkpoints").is_dir():
        out |= training(directory) | state_digests(directory)
    return out


_TIMES = ("metrics.jsonl", "provenance.json")
_TIMED_RESULTS = ("tokens_per_s", "seconds", "created", "notes")


def training(directory: Path) -> dict[str, Any]:
    """Losses of every step and of every evaluation as hexadecimal floats, and the samples."""
    from jaxlm.metrics_log import history

    out: dict[str, Any] = {}
    for record in history(directory):
        if "split" in record:
            key = f"{record['split']} {record['step']}"
            values = [record["loss"], record.get("grad_norm"), float(record["tokens"])]
            value: Any = [None if x is None else x.hex() for x in values]
        else:
            key, value = f"{record['event']} {record['step']}", record.get("text", record.get("skipped"))
        assert key not in out, f"{key} is there twice"
        out[key] = value
    return out


def state_digests(directory: Path) -> dict[str, Any]:
    """Step of the newest checkpoint and the digest of each of its arrays: parameters, moments, counters."""
    import numpy as np
    import orbax.checkpoint as ocp

    step = saved_steps(directory)[-1]
    out: dict[str, Any] = {"state step": step}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for item in ("params", "rest"):
            tree = reader.restore((directory / "checkpoints" / str(step) / item).resolve())
            out |= {f"state {item}/{name}": _digest(np.asarray(leaf)) for name, leaf in _leaves(tree)}
    return out


def _leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    return [pair for name, item in sorted(tree.items()) for pair in _leaves(item, f"{prefix}/{name}")]


def _digest(array: Any) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()
