"""Runs a stage with one of its functions wrapped, or with small files only: see `harness.Hold`. Not a test."""

from __future__ import annotations

import importlib
import json
import resource
import runpy
import sys
import time
from functools import reduce
from pathlib import Path
from typing import Any


def hold_at(target: str, call: str, marker: str, seconds: str) -> None:
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = reduce(getattr, parents, importlib.import_module(module))
    original, left = getattr(owner, name), [int(call)]

    def held(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            Path(marker).touch()
            end = time.monotonic() + float(seconds)
            while time.monotonic() < end:
                time.sleep(0.05)
        return original(*args, **kwargs)

    setattr(owner, name, held)


if __name__ == "__main__":
    held, file_size = json.loads(sys.argv[1])
    stage_module, *rest = sys.argv[2:]
    if held:
        hold_at(*held)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = [stage_module, *rest]
    runpy.run_module(stage_module, run_name="__main__", alter_sys=True)
