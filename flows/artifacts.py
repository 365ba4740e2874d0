"""What a flow shows in Prefect while it runs: progress, metrics, the loss curve, a sample, and then the report.

An artifact that cannot be written is left out: the API may be away, and a training does not fail, or wait, for that.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows import server
from flows.curve import loss_svg
from jaxlm.stages.runner import say
from jaxlm.stages.spec import Spec

PROGRESS_SECONDS = 2.0  # between two updates of a progress artifact
CURVE_SECONDS = 30.0  # between two drawings of the curve, where no evaluation asks for one
AWAY_SECONDS = 60.0  # without a try, after one has failed
MAX_MARKDOWN = 200_000  # characters

T = TypeVar("T")
COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s")


def key(*parts: str) -> str:
    """An artifact's key: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


class StageArtifacts:
    """The live artifacts of one stage. Call it with each record of its metrics.jsonl."""

    def __init__(self, run: str, spec: Spec) -> None:
        self._names = (run, spec.stage)
        self._title = f"{spec.stage} of {run}"
        self._steps = total_steps(spec)
        self._rows: dict[int, dict[str, Any]] = {}
        self._progress: UUID | None = None
        self._next_progress = self._next_curve = 0.0
        self._away_until = 0.0

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Takes one record; at most a few calls of the API come of it."""
        step = record.get("step")
        if not isinstance(step, int):
            return
        if record.get("event") == "sample":
            self.sample(step, str(record.get("text", "")))
        if record.get("split") not in ("train", "val"):
            return
        row = self._rows.setdefault(step, {"step": step})
        if record["split"] == "val":
            row["val_loss"] = record.get("loss")
            self.table()
            self.curve()
        else:
            row |= {name: record[name] for name in COLUMNS if name in record}
        now = time.monotonic()
        if self._steps and now >= self._next_progress:
            self._next_progress = now + PROGRESS_SECONDS
            self.progress(100.0 * min(step, self._steps) / self._steps)
        if len(self._rows) > 1 and now >= self._next_curve:
            self.curve()

    def progress(self, percent: float) -> None:
        """Sets the progress artifact, which is made at the first call."""
        if self._progress is None:
            made = self._safely(
                lambda: create_progress_artifact(percent, key=key(*self._names, "progress"), description=self._title)
            )
            self._progress = made if isinstance(made, UUID) else None
        else:
            known = self._progress
            self._safely(lambda: update_progress_artifact(known, percent))

    def table(self) -> None:
        """Writes the table of the steps that were evaluated."""
        rows = [row for _, row in sorted(self._rows.items()) if "val_loss" in row]
        cells = [{name: text(row.get(name)) for name in columns(rows)} for row in rows]
        self._safely(
            lambda: create_table_artifact(cells, key=key(*self._names, "metrics"), description=f"# {self._title}")
        )

    def curve(self) -> None:
        """Draws training and validation loss by step."""
        self._next_curve = time.monotonic() + CURVE_SECONDS
        drawing = loss_svg([row for _, row in sorted(self._rows.items())])
        if not drawing:
            return
        image = base64.b64encode(drawing.encode()).decode()
        page = f"# {self._title}\n\n![loss by step](data:image/svg+xml;base64,{image})\n"
        self._safely(lambda: create_markdown_artifact(page, key=key(*self._names, "loss")))

    def sample(self, step: int, written: str) -> None:
        """Shows what the model writes after a step."""
        quoted = "\n".join(f"    {line}" for line in written.splitlines())  # a code block, whatever the model wrote
        page = f"# {self._title}\n\nAfter step {step}:\n\n{quoted}\n"
        self._safely(lambda: create_markdown_artifact(page[:MAX_MARKDOWN], key=key(*self._names, "sample")))

    def finished(self) -> None:
        """The last word of a stage that is done."""
        if self._progress is not None:
            self.progress(100.0)

    def report(self, path: Path) -> None:
        """Shows a Markdown report."""
        self._safely(
            lambda: create_markdown_artifact(
                path.read_text(encoding="utf-8")[:MAX_MARKDOWN], key=key(self._names[0], "report")
            )
        )

    def _safely(self, call: Callable[[], T]) -> T | None:
        if time.monotonic() < self._away_until:
            return None
        if not server.away():  # asked first: a call would be tried again and again while the stage is waiting
            try:
                return call()
            except Exception as error:  # a training does not fail for a picture, but what is wrong here is told
                if not server.away():
                    say(f"{'/'.join(self._names)}: not shown in Prefect ({type(error).__name__}: {error})")
        self._away_until = time.monotonic() + AWAY_SECONDS
        return None


def total_steps(spec: Spec) -> int:
    """The optimizer steps that a stage will take; 0 for a stage that does not train."""
    settings = spec.settings
    train = settings.get("train") or settings.get("sft", {}).get("train") or {}
    return int(train.get("steps", 0))


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that have a value in one of the rows."""
    return [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]


def text(value: Any) -> str:
    """A figure for people."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
