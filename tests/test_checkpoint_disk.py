"""Checkpoints where the disk or the writer fails: no space, kill -9 in mid-save, directories in use or not writable."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm._disk import disk_errors
from jaxlm.checkpoint import Checkpointer, dir_lock, restore, steps
from jaxlm.errors import DiskError, InputError

WANTED = {"params": {"w": jax.ShapeDtypeStruct((300,), jnp.float32)}}


WRITER = """
import json, resource, sys
import jax.numpy as jnp, numpy as np
from jaxlm.checkpoint import Checkpointer
from jaxlm.errors import DiskError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

big = {"params": {"w": jnp.asarray(np.random.default_rng(0).standard_normal(300_000, np.float32))}}
small = {"params": {"w": jnp.ones(300)}}
failures = []
with Checkpointer(sys.argv[1]) as checkpointer:
    checkpointer.save(1, small, meta={})
    checkpointer.wait()
    for size in (0, 100, 5_000, 100_000):  # the disk fills up while different files are being written
        limit(size)
        try:
            checkpointer.save(2, big, meta={})
            checkpointer.wait()
        except DiskError as error:
            failures.append(str(error))
        limit(resource.RLIM_INFINITY)
        failures.append(checkpointer.latest_saved)
    checkpointer.save(2, small, meta={})
    checkpointer.wait()
    print(json.dumps(failures), flush=True)
    sys.stdin.readline()
    checkpointer.save(3, {"params": {"w": jnp.arange(40_000_000.0)}}, meta={})
    print("saving", flush=True)
    sys.stdin.read()
"""


def test_a_full_disk_then_kill_9_in_the_middle_of_a_save(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        failures = json.loads(writer.stdout.readline())
        assert failures[1::2] == [1, 1, 1, 1]  # a failed save is never the latest
        for message in failures[::2]:
            assert message.startswith(f"cannot save step 2 in {tmp_path}: File too large (")
            assert " bytes are free there" in message
        assert steps(tmp_path) == [1, 2]  # the saves after a failure work
        with pytest.raises(InputError, match=rf"{tmp_path} is in use by process {writer.pid} on host"):
            Checkpointer(tmp_path)
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "saving\n"
    finally:
        writer.kill()
        writer.wait()
    assert any(path.name.startswith("3.unfinished") for path in tmp_path.iterdir())  # it was in mid-save
    back = restore(tmp_path, WANTED)
    assert back is not None
    assert (back.step, back.damaged) == (2, [])
    np.testing.assert_array_equal(back.items["params"]["w"], np.ones(300))
    with Checkpointer(tmp_path) as checkpointer:  # the lock died with its owner
        assert checkpointer.save(3, {"params": {"w": jnp.ones(300)}}, meta={})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "2", "3"]


OWNER = """
import os, subprocess, sys, time
from jaxlm._lock import dir_lock
assert "jax" not in sys.modules
with dir_lock(sys.argv[1]):
    executed = subprocess.Popen(["sleep", "60"], close_fds=False).pid
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.1)
    print(executed, forked, flush=True)
    time.sleep(60)
"""


def test_a_killed_owners_children_do_not_keep_its_lock(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert owner.stdout is not None
    children = [int(pid) for pid in owner.stdout.readline().split()]
    try:
        with pytest.raises(InputError, match=f"in use by process {owner.pid}"), dir_lock(tmp_path):
            pass
        owner.kill()
        owner.wait()
        for child in children:
            os.kill(child, 0)  # still there
        with dir_lock(tmp_path):
            pass
    finally:
        owner.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)


def test_a_read_only_directory_is_named() -> None:
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    directory = parent / "read only"
    directory.mkdir(mode=0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # the superuser may write anywhere
        for path in (directory, directory / "below"):
            with pytest.raises(InputError, match=rf"cannot take the lock in {path}: Permission denied; choose a dir"):
                Checkpointer(path)
    finally:
        os.seteuid(user)
        shutil.rmtree(parent)


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=rf"cannot take the lock in {path}: (File exists|Not a directory)"):
            Checkpointer(path)


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm._writer.free_bytes", lambda _: 1199)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(DiskError, match=rf"step 1 in {tmp_path}: it needs 1,200 bytes and 1,199 are free"):
            checkpointer.save(1, {"params": {"w": jnp.ones(300)}}, meta={})  # 300 * 4 bytes
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_every_failure_of_a_disk_is_a_disk_error(tmp_path: Path, number: int) -> None:
    # The two ways in which TensorStore 0.1.86 and older ones tell of an operating system's error.
    for error in (
        OSError(number, os.strerror(number)),
        ValueError(f"DATA_LOSS: Error writing local file [os_error_code='{number}']"),
        ValueError(f"Failed to write [OS error {number}: what]"),
        ExceptionGroup("several", [ValueError("other"), OSError(number, "x")]),
    ):
        message = rf"cannot save in {tmp_path}: {os.strerror(number)} \([0-9,]+ bytes are free"
        with pytest.raises(DiskError, match=message), disk_errors("save", tmp_path):
            raise error
        with pytest.raises(DiskError), disk_errors("save", tmp_path):
            raise RuntimeError("wrapped") from error
    with pytest.raises(KeyError), disk_errors("save", tmp_path):
        raise KeyError(number)
