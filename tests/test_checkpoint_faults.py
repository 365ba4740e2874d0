"""Checkpoints that something has happened to: damaged files, full disks, killed writers, directories in use."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoint
from jaxlm._digests import Damage, read_manifest
from jaxlm._disk import disk_errors
from jaxlm.checkpoint import Checkpointer, dir_lock, restore, restore_step_dir, steps, verify
from jaxlm.errors import DiskError, InputError

WANTED = {"params": {"w": jax.ShapeDtypeStruct((300,), jnp.float32)}}


def save_steps(directory: Path, *numbers: int, leaf: str = "w") -> None:
    with Checkpointer(directory, keep_latest=10) as checkpointer:
        for step in numbers:
            w = jax.random.normal(jax.random.key(step), (300,)) + step
            assert checkpointer.save(step, {"params": {leaf: w}, "rest": {leaf: jnp.int32(step)}}, meta={"run": 1})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save_steps(directory, 1, 2, 3)
    return directory


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a directory with the good checkpoints 1, 2 and 3."""
    return shutil.copytree(pristine, tmp_path / "run")


@pytest.mark.parametrize("kind", ["flip", "zero", "truncate", "remove", "swap"])
def test_damage_to_any_file_is_named_and_passed_over(run: Path, tmp_path: Path, kind: str) -> None:
    if kind == "swap":
        save_steps(tmp_path / "other", 3, leaf="other")
        others = files(tmp_path / "other" / "3")
    names = [path.relative_to(run / "3") for path in files(run / "3")]
    assert len(names) > 15
    assert {"digests.json", "_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt"} <= set(map(str, names))
    for index, name in enumerate(names):
        path = run / "3" / name
        data = path.read_bytes()
        if kind == "flip":
            flip(path)
        elif kind == "zero":
            path.write_bytes(bytes(min(4096, len(data))) + data[4096:])
        elif kind == "truncate":
            path.write_bytes(data[:-1])
        elif kind == "remove":
            path.unlink()
        elif kind == "swap":
            # Orbax names data files at random: the other run's file in the same place of the listing stands for them.
            same = tmp_path / "other" / "3" / name
            path.write_bytes((same if same.exists() else others[index]).read_bytes())
            assert path.read_bytes() != data
        named = [(damage.step, damage.file) for damage in verify(run)]
        if kind == "swap" and name.name == "digests.json":  # it is whole: by its word, all the others are wrong
            assert {file for _, file in named} > {str(other) for other in names if other.parent.name == "params"}
        else:
            assert named == [(3, str(name))]
        back = restore(run, {})
        assert back is not None
        assert (back.step, [(damage.step, damage.file) for damage in back.damaged]) == (2, named)
        path.write_bytes(data)
    assert verify(run) == []


def test_a_change_to_a_byte_of_the_manifest_shows_anywhere(run: Path) -> None:
    path = run / "3" / "digests.json"
    data = path.read_bytes()
    assert not isinstance(read_manifest(run / "3", 3), Damage)
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert isinstance(read_manifest(run / "3", 3), Damage), place
    path.write_bytes(data + b"\n")
    assert isinstance(read_manifest(run / "3", 3), Damage)


def test_a_manifest_of_another_schema_is_not_called_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxlm._digests.SCHEMA", 2)
    with pytest.raises(InputError, match=r"digests\.json has schema 1, this jaxlm reads 2"):
        restore(run, {})


def test_a_folder_under_another_steps_name_is_damage(run: Path) -> None:
    shutil.copytree(run / "2", run / "4")
    assert verify(run) == [Damage(4, "digests.json", "is of step 2")]


def test_the_newest_good_one_is_restored_and_its_values_are_right(run: Path) -> None:
    expected = np.asarray(jax.random.normal(jax.random.key(1), (300,)) + 1)
    flip(run / "2" / "params" / "_METADATA")
    shutil.rmtree(run / "3")
    (run / "3").mkdir()  # an empty step folder
    back = restore(run, WANTED)
    assert back is not None
    assert back.step == 1
    assert [str(damage)[:38] for damage in back.damaged] == [
        "step 3: digests.json is missing",
        "step 2: params/_METADATA has changed: ",
    ]
    np.testing.assert_array_equal(back.items["params"]["w"], expected)
    assert steps(run) == [1, 2]  # by names and sizes; `verify` and `restore` read the contents
    for path, step in ((run / "2", 2), (run / "3", 3)):
        with pytest.raises(InputError, match=rf"no checkpoint in .* is undamaged \(step {step}: "):
            restore_step_dir(path, WANTED)
        with pytest.raises(InputError, match=f"step {step}: "):
            restore(run, WANTED, step=step)


def test_all_damaged_is_an_error_that_names_each(run: Path) -> None:
    for step in (1, 2, 3):
        (run / str(step) / "_CHECKPOINT_METADATA").write_bytes(b"")
    with pytest.raises(InputError, match=r"step 3: _CHECKPOINT_METADATA has 0 bytes.*; step 2: .*; step 1: "):
        restore(run, WANTED)
    assert restore(run.parent / "new", WANTED) is None  # only a directory without any checkpoint is a fresh start


def test_a_run_goes_on_over_its_damaged_checkpoints(run: Path) -> None:
    """Restored from 2 because 3 is damaged: steps up to 3 are new again, and saving 3 replaces the damaged one."""
    flip(next(path for path in files(run / "3" / "params") if path.parent.name == "d"))
    with Checkpointer(run, keep_latest=2) as checkpointer:
        assert checkpointer.save(2, {"params": {"w": jnp.zeros(300)}}, meta={}) is False
        assert checkpointer.save(3, {"params": {"w": jnp.ones(300)}}, meta={})
        assert checkpointer.save(4, {"params": {"w": jnp.ones(300)}}, meta={})
    assert (steps(run), verify(run)) == ([3, 4], [])


def test_a_damaged_newer_one_stays_until_a_good_one_is_newer(run: Path) -> None:
    shutil.copytree(run / "3", run / "9")
    with Checkpointer(run, keep_latest=1) as checkpointer:
        assert checkpointer.save(5, {"params": {"w": jnp.ones(300)}}, meta={})
        checkpointer.wait()
        assert sorted(path.name for path in run.iterdir()) == [".lock", "5", "9"]
        assert checkpointer.save(10, {"params": {"w": jnp.ones(300)}}, meta={})
    assert sorted(path.name for path in run.iterdir()) == [".lock", "10"]


@pytest.mark.parametrize("moment", ["check", "_read"])
def test_a_reader_goes_on_when_the_writer_removes_what_it_reads(
    run: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As with `keep_latest=1`: step 4 appears, and the steps that the reader has listed go."""
    original = getattr(checkpoint, moment)

    def slow(folder: Path, *rest: Any, **options: Any) -> Any:
        if not (run / "4").exists():
            save_steps(run, 4)
            for step in (1, 2, 3):
                shutil.rmtree(run / str(step))
        return original(folder, *rest, **options)

    monkeypatch.setattr(checkpoint, moment, slow)
    back = restore(run, WANTED)
    assert back is not None
    assert (back.step, back.damaged) == (4, [])


@pytest.mark.parametrize(
    ("leave", "latest"),
    [
        (lambda run: (run / "3").rename(run / "3.unfinished.orbax-checkpoint-tmp"), 2),  # Orbax was writing
        (lambda run: (run / "3").rename(run / "3.orbax-checkpoint-tmp-17"), 2),
        (lambda run: [(run / "3").rename(run / "3.unfinished"), (run / "3.unfinished/digests.json").unlink()], 2),
        (lambda run: (run / "3").rename(run / "3.unfinished"), 2),  # the manifest was there, the name was not
        (lambda run: [shutil.copytree(run / "3", run / "3.unfinished"), (run / "3").rename(run / "3.replaced")], 3),
        (lambda run: shutil.copytree(run / "3", run / "3.replaced"), 3),  # replaced, not yet removed
        (lambda run: [(run / "1").rename(run / "1.deleted"), (run / "1.deleted/digests.json").unlink()], 3),
    ],
)
def test_whatever_a_killed_writer_leaves_is_neither_read_nor_kept(
    run: Path, leave: Callable[[Path], Any], latest: int
) -> None:
    leave(run)
    (run / "notes.unfinished").mkdir()  # not ours
    back = restore(run, WANTED)
    assert back is not None
    assert (back.step, back.damaged) == (latest, [])
    before = sorted(path.name for path in run.iterdir())
    with dir_lock(run), pytest.raises(InputError, match="in use"):
        Checkpointer(run)
    assert sorted(path.name for path in run.iterdir()) == before  # without the lock, nothing is touched
    Checkpointer(run).close()
    names = {path.name for path in run.iterdir()}
    assert names - {"1", "2", "3"} == {".lock", "notes.unfinished"}
    assert (steps(run)[-1], verify(run)) == (latest, [])


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
