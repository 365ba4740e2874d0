"""Checkpoints that something has happened to: damaged files, full disks, killed writers, directories in use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import checkpoint
from jaxlm._digests import Damage, read_manifest
from jaxlm.checkpoint import Checkpointer, dir_lock, restore, restore_step_dir, steps, verify
from jaxlm.errors import InputError

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
