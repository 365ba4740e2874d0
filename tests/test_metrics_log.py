from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.errors import DiskError, InputError
from jaxlm.metrics_log import MetricsLog, history


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit (RFC 3720, B.4: reflected polynomial 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """TFRecord's mask of a checksum (tensorflow/core/lib/hash/crc32c.h)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(directory: Path) -> list[Any]:
    """The events of the one event file: length, its checksum, the message, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (directory / "tensorboard").glob("events.out.tfevents.*")
    data, events = file.read_bytes(), []
    while data:
        header, (header_crc,) = data[:8], struct.unpack("<I", data[8:12])
        (size,) = struct.unpack("<Q", header)
        body, (body_crc,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size : 16 + size])
        assert header_crc == masked(crc32c(header))
        assert body_crc == masked(crc32c(body))
        events.append(Event.FromString(body))
        data = data[16 + size :]
    return events


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    return [
        (value.tag, event.step, value.simple_value)
        for event in read_events(directory)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]


def train(step: int) -> dict[str, Any]:
    return {"step": step, "split": "train", "loss": 1 / step, "tokens": step * 8}


def steps(directory: Path) -> list[int]:
    return [record["step"] for record in history(directory)]


def test_the_checksum_of_this_test_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C in the catalogue of CRCs


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "stage") as log:
        log.write({"step": 1, "split": "train", "loss": 2.5, "tokens": 8})
        log.write({"event": "sample", "step": 1, "text": "naïve\nsecond line \u2028"})
    first, second = history(tmp_path / "stage" / "metrics.jsonl")
    assert {key: first[key] for key in ("step", "split", "loss", "tokens")} == {
        "step": 1,
        "split": "train",
        "loss": 2.5,
        "tokens": 8,
    }
    assert abs(first["time"] - time.time()) < 60
    assert second["text"] == "naïve\nsecond line \u2028"
    assert len((tmp_path / "stage" / "metrics.jsonl").read_bytes().split(b"\n")) == 3


def test_records_can_be_read_while_the_log_is_open(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(train(1))
        assert steps(tmp_path) == [1]
        log.write(train(2))
        assert steps(tmp_path) == [1, 2]


def test_array_scalars_and_figures_that_are_not_finite(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(
            {
                "step": np.int64(1),
                "split": "train",
                "loss": np.float32(math.nan),
                "grad_norm": math.inf,
                "lr": np.float32(0.5),
            }
        )
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["grad_norm"] is None
    assert (record["step"], record["lr"]) == (1, 0.5)
    assert scalars(tmp_path) == [("train/lr", 1, 0.5)]


def test_no_file_is_an_empty_history(tmp_path: Path) -> None:
    assert history(tmp_path) == []
    assert history(tmp_path / "metrics.jsonl") == []


def test_every_cut_of_the_last_line_is_tolerated(tmp_path: Path) -> None:
    whole = '{"step": 1}\n{"step": 2, "text": "né"}\n'.encode()
    first = whole.index(b"\n") + 1
    file = tmp_path / "metrics.jsonl"
    for length in range(first, len(whole) - 2):
        file.write_bytes(whole[:length])
        assert history(file) == [{"step": 1}], length
    for length in (len(whole) - 1, len(whole)):  # without its line end, but complete
        file.write_bytes(whole[:length])
        assert [record["step"] for record in history(file)] == [1, 2]
    file.write_bytes(whole[:first] + b"\0\0\0\0")  # what a power cut can leave
    assert history(file) == [{"step": 1}]


@pytest.mark.parametrize("damage", ["{torn", "[1]", "7"])
@pytest.mark.parametrize("after", ['{"step": 3}\n', ""])
def test_damage_that_is_no_cut_is_named(tmp_path: Path, damage: str, after: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + damage + "\n" + after)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        history(tmp_path)


def test_resuming_removes_what_came_after_the_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 8):
            log.write(train(step))
        log.write({"event": "sample", "step": 7, "text": "lost"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "split": "tr')
    with MetricsLog(tmp_path, resume_step=4) as log:
        assert steps(tmp_path) == [1, 2, 3, 4]
        for step in range(5, 10):
            log.write(train(step))
    assert steps(tmp_path) == list(range(1, 10))
    losses = [(step, value) for tag, step, value in scalars(tmp_path) if tag == "train/loss"]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 10)]
    assert not list(tmp_path.glob("*.part"))


def test_a_record_without_a_step_stays_only_before_the_cut(tmp_path: Path) -> None:
    lines = [{"event": "start"}, {"step": 1}, {"event": "note"}, {"step": 3}, {"event": "late"}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsLog(tmp_path, resume_step=2).close()
    assert history(tmp_path) == [{"event": "start"}, {"step": 1}, {"event": "note"}, {"step": 2}]


def test_a_fresh_run_keeps_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsLog(tmp_path) as log:
            log.write(train(1))
    assert steps(tmp_path) == [1]
    assert [step for tag, step, _ in scalars(tmp_path) if tag == "train/loss"] == [1]


def test_tensorboard_files_hold_scalars_and_texts(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 3, "split": "val", "loss": 1.5, "tokens": 24, "done": True})
        log.write({"event": "sample", "step": 3, "text": "Mara went home."})
    events = read_events(tmp_path)
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == events[1].session_log.START
    assert scalars(tmp_path) == [("val/loss", 3, 1.5), ("val/tokens", 3, 24.0)]
    (text,) = (value for event in events for value in event.summary.value if value.HasField("tensor"))
    assert text.metadata.plugin_data.plugin_name == "text"
    assert list(text.tensor.string_val) == [b"Mara went home."]
    assert abs(events[-1].wall_time - time.time()) < 60


WRITER = """
import sys
from jaxlm.metrics_log import MetricsLog
with MetricsLog(sys.argv[1], resume_step=0) as log:
    for step in range(1, 10**9):
        log.write({"step": step, "split": "train", "loss": 1.0, "padding": "x" * 200})
        print(step, flush=True)
"""


def test_a_killed_writer_loses_no_record(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 50:
            pass
        writer.send_signal(signal.SIGKILL)
        reported = [int(line) for line in writer.stdout.read().split("\n")[:-1]]
    found = steps(tmp_path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= max(reported, default=50)
    with MetricsLog(tmp_path, resume_step=30) as log:
        log.write(train(31))
    assert steps(tmp_path) == list(range(1, 32))


FILLER = """
import resource, sys
from jaxlm.errors import DiskError
from jaxlm.metrics_log import MetricsLog
log = MetricsLog(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for step in range(1, 10_000):
        log.write({"step": step, "split": "train", "loss": 1.0})
except DiskError as error:
    print(step, error)
    sys.exit(74)
"""


def test_a_full_disk_stops_the_run_with_one_sentence_and_keeps_what_was_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILLER, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == DiskError.exit_code, done.stderr
    failed, sentence = done.stdout.split(" ", 1)
    assert "cannot write metrics (File too large)" in sentence
    assert int(failed) - 1 <= len(steps(tmp_path)) <= int(failed)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot write"):
        MetricsLog(tmp_path / "stage")


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "stage").write_text("")
    with pytest.raises(DiskError, match="cannot write metrics"):
        MetricsLog(tmp_path / "stage")
