"""What a flow shows in Prefect while it runs: progress, a table of metrics, the report.

An artifact that cannot be written is left out: the API may be away, and a training does not fail for that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from jaxlm.stages.spec import Spec

PROGRESS_SECONDS = 2.0  # between two updates of a progress artifact
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
        self._steps = total_steps(spec)
        self._rows: dict[int, dict[str, Any]] = {}
        self._progress: UUID | None = None
        self._next_progress = 0.0
        self._away_until = 0.0

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Takes one record; at most a few calls of the API come of it."""
        step = record.get("step")
        if not isinstance(step, int) or record.get("split") not in ("train", "val"):
            return
        row = self._rows.setdefault(step, {"step": step})
        if record["split"] == "val":
            row["val_loss"] = record.get("loss")
            self.table()
        else:
            row |= {name: record[name] for name in COLUMNS if name in record}
        if self._steps and time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + PROGRESS_SECONDS
            self.progress(100.0 * min(step, self._steps) / self._steps)

    def progress(self, percent: float) -> None:
        """Sets the progress artifact, which is made at the first call."""
        if self._progress is None:
            about = f"{self._names[1]} of {self._names[0]}"
            made = self._safely(
                lambda: create_progress_artifact(percent, key=key(*self._names, "progress"), description=about)
            )
            self._progress = made if isinstance(made, UUID) else None
        else:
            known = self._progress
            self._safely(lambda: update_progress_artifact(known, percent))

    def table(self) -> None:
        """Writes the table of the steps that were evaluated."""
        rows = [row for _, row in sorted(self._rows.items()) if "val_loss" in row]
        text = f"# {self._names[1]} of {self._names[0]}\n\n{table(rows)}"
        self._safely(lambda: create_markdown_artifact(text, key=key(*self._names, "metrics")))

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
        try:
            return call()
        except Exception:
            self._away_until = time.monotonic() + AWAY_SECONDS
            return None


def total_steps(spec: Spec) -> int:
    """The optimizer steps that a stage will take; 0 for a stage that does not train."""
    settings = spec.settings
    train = settings.get("train") or settings.get("sft", {}).get("train") or {}
    return int(train.get("steps", 0))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of metrics."""
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [f"| {' | '.join(columns)} |", f"|{' ---: |' * len(columns)}"]
    lines += [f"| {' | '.join(_text(row.get(name)) for name in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
