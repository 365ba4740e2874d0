"""How much memory is left: the machine's figure, or the control group's if that is less."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlm._memory import available_bytes
from jaxlm.checkpoint import Checkpointer
from jaxlm.errors import InputError

MB = 1 << 20


def machine(root: Path, available_kb: int, group: str = "/") -> Path:
    (root / "self").mkdir(parents=True)
    (root / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable:   {available_kb} kB\nBuffers: 1 kB\n")
    (root / "self" / "cgroup").write_text(f"0::{group}\n")
    return root


def group(folder: Path, limit: int | str, used: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def test_the_least_of_machine_and_groups(tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path / "proc", 4 * MB // 1024, "/pod/job"), tmp_path / "cgroup"
    assert available_bytes(proc, cgroup) == 4 * MB  # no groups
    group(cgroup / "pod" / "job", "max", 10 * MB)
    assert available_bytes(proc, cgroup) == 4 * MB
    group(cgroup / "pod", 12 * MB, 10 * MB)
    assert available_bytes(proc, cgroup) == 2 * MB
    group(cgroup / "pod", 12 * MB, 10 * MB, inactive=1 * MB)  # the kernel gives caches of files back
    assert available_bytes(proc, cgroup) == 3 * MB
    group(cgroup / "pod" / "job", 1 * MB, 2 * MB)
    assert available_bytes(proc, cgroup) == 0


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


def test_this_machine_tells() -> None:
    found = available_bytes()
    assert found is None or found > MB


def test_too_little_memory_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm._writer.available_bytes", lambda: 1199)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(
            InputError, match=rf"step 1 in {tmp_path}: its copy needs 1,200 bytes of memory and 1,199 are"
        ):
            checkpointer.save(1, {"params": {"w": jnp.ones(300)}}, meta={})  # 300 * 4 bytes
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        monkeypatch.setattr("jaxlm._writer.available_bytes", lambda: None)
        assert checkpointer.save(1, {"params": {"w": jnp.ones(300)}}, meta={})
