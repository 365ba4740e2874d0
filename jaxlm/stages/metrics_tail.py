"""The metrics of a stage, read while it writes them. Loads no jax."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

from jaxlm.launch.tail import Tail

OnMetrics = Callable[[dict[str, Any]], None]


@contextmanager
def metrics_followed(path: Path, on_metrics: OnMetrics | None) -> Iterator[None]:
    """Calls `on_metrics` with each new record, from a thread that starts with the caller's context variables."""
    if on_metrics is None:
        yield
        return
    tail, stop = MetricsTail(path), threading.Event()

    def follow() -> None:
        while True:
            ending = stop.is_set()
            for record in tail.new():
                with suppress(Exception):
                    on_metrics(record)
            if ending:
                return
            stop.wait(0.5)

    thread = threading.Thread(target=copy_context().run, args=(follow,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5.0)


class MetricsTail:
    """Reads what has been added to a metrics.jsonl since the last look; from its start when the file is a new one."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path, from_end=False)

    def new(self) -> list[dict[str, Any]]:
        """The whole lines added since the last call, parsed. A missing file has none."""
        records = []
        for line in self._tail.new():
            with suppress(ValueError):
                records.append(json.loads(line))
        return [record for record in records if isinstance(record, dict)]
