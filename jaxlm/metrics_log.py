"""What a training run reports while it goes: `metrics.jsonl`, and the same figures as TensorBoard event files.

One JSON object a line: `{"step": 10, "split": "train", "loss": 1.25, "tokens": 10240, ...}` or
`{"event": "sample", "step": 100, "text": "..."}`. The `.jsonl` file is the truth; the event file is made from it again
whenever a log is opened, so after a resume no step appears twice in either. Loads no jax.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxlm.errors import DiskError, InputError

FILE_NAME = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
FLUSH_SECONDS = 5.0  # how far the event file may lag behind

Record = dict[str, Any]


def history(path: str | Path) -> list[Record]:
    """Reads the records of a `metrics.jsonl`, also while another process appends to it.

    A last line that is cut short (its writer was killed, or is in the middle of it) is left out.

    Args:
        path: the file, or the directory that holds it.

    Returns:
        The records, oldest first; none when the file does not exist yet.

    Raises:
        InputError: a line other than the last is not a JSON object.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    last = max((number for number, line in enumerate(lines, start=1) if line.strip()), default=0)
    records: list[Record] = []
    for number, line in enumerate(lines[:last], start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < last or len(lines) > last:  # a line end follows, so the line is damaged and not cut short
            raise InputError(f"{file}, line {number}: not a JSON object; delete this line, or the file, and run again.")
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too: a cut may fall inside a character
        return None
    return record if isinstance(record, dict) else None


class MetricsLog:
    """Appends records to `directory/metrics.jsonl` and to event files in `directory/tensorboard`.

    Every record is handed to the operating system before `write` returns, so a killed process loses none; the event
    file follows within seconds. There is one writer at a time: the lock of the stage directory sees to that.

    Args:
        directory: where both live; made when it is missing.
        resume_step: the step that training continues from. Records of later steps belong to a future that will be
            trained again, and are removed. None: a fresh run, nothing is kept.

    Raises:
        DiskError: the files cannot be written.
        InputError: the existing `metrics.jsonl` is damaged before its last line.
    """

    def __init__(self, directory: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(directory) / FILE_NAME
        kept = [] if resume_step is None else _up_to(history(self.path), resume_step)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, "".join(_line(record) for record in kept))
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            self._events = _EventFile(self.path.parent / TENSORBOARD_DIR, kept)
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record.

        `time` (seconds since 1970) is added. A figure that is not finite is written as null, which is what JSON has for
        it; array scalars are taken out of their arrays.

        Raises:
            DiskError: the disk is full or failing.
        """
        plain = {key: _plain(value) for key, value in record.items()}
        plain.setdefault("time", round(time.time(), 3))
        data = memoryview(_line(plain).encode())
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            self._events.add(plain)
            self._events.flush_sometimes()
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def close(self) -> None:
        """Closes both files; harmless when called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            try:
                self._events.close()
            except OSError as error:
                raise _disk_error(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Unwritten(MetricsLog):
    """The log of a process whose peer writes it: its records go nowhere, and those of the peer can be read."""

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / FILE_NAME

    def write(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _up_to(records: Iterable[Record], step: int) -> list[Record]:
    """The records of steps up to `step`. One without a step stays when no removed record came before it."""
    kept: list[Record] = []
    removed = False
    for record in records:
        own = record.get("step")
        if removed if own is None else own > step:
            removed = True
        else:
            kept.append(record)
    return kept


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Puts `text` at `path` by rename: a reader sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _disk_error(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{path}: cannot write metrics ({error.strerror or error}); free some space and run again to continue."
    )


class _EventFile:
    """One TensorBoard event file, made from `records` and then appended to.

    tensorboardX's `SummaryWriter` hands events to a thread through a bounded queue: when the disk is full the thread
    dies and the training loop blocks for ever. Its synchronous `EventsWriter` raises in the caller instead.
    """

    def __init__(self, directory: Path, records: Iterable[Record]) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = EventsWriter(str(directory / "events"))
        self._announce_restart()
        for record in records:
            self.add(record)
        self._next_flush = 0.0
        self.flush_sometimes()

    def _announce_restart(self) -> None:
        # A TensorBoard that is watching drops what it has read of the old file.
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._writer.write_event(Event(step=0, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))

    def add(self, record: Record) -> None:
        """Every number of a record becomes the scalar `split/name`, a text becomes a text summary."""
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        step = record.get("step")
        if step is None:
            return
        group = record.get("split") or record.get("event") or "run"
        for name, value in record.items():
            if name in ("step", "split", "event", "time"):
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                content = summary.scalar(f"{group}/{name}", value)
            elif isinstance(value, str):
                content = summary.text(f"{group}/{name}", value)
            else:
                continue
            self._writer.write_event(Event(step=step, wall_time=record.get("time", 0.0), summary=content))

    def flush_sometimes(self) -> None:
        # EventsWriter.flush is an fsync, milliseconds on a local disk and more on a shared one: not for every record.
        if time.monotonic() >= self._next_flush:
            self._writer.flush()
            self._next_flush = time.monotonic() + FLUSH_SECONDS

    def close(self) -> None:
        self._writer.close()
