"""How much memory a process can still take, so that a copy too large is told and not killed for; and how many cores.

Loads no jax.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def cores() -> int:
    """The cores that this process may run on; all of the machine's where the system does not tell, as on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes(proc: Path = PROC, cgroup: Path = CGROUP) -> int | None:
    """Bytes that this process can still take: what the machine has left, or its control group if that is less.

    Memory that the kernel can give back (caches of files) counts as available.

    Returns:
        None where the system does not tell, as on macOS.
    """
    found = [value for value in (_machine(proc), *_groups(proc, cgroup)) if value is not None]
    return min(found, default=None)


def _machine(proc: Path) -> int | None:
    with suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
        return int(match[1]) * 1024 if match else None
    return None


def _groups(proc: Path, cgroup: Path) -> list[int | None]:
    """What is left in this process's control group and in each above it (cgroup v2)."""
    try:
        line = next(x for x in (proc / "self" / "cgroup").read_text().splitlines() if x.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = cgroup / line.removeprefix("0::").strip().lstrip("/")
    return [_left(folder) for folder in (group, *group.parents) if folder == cgroup or cgroup in folder.parents]


def _left(group: Path) -> int | None:
    """None where the group has no limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        match = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used + (int(match[1]) if match else 0))
