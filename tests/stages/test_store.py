from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from jaxlm.checkpoint import Checkpointer
from jaxlm.errors import DiskError, InputError
from jaxlm.stages import store, verification
from jaxlm.stages.process import execute
from jaxlm.stages.spec import Manifest


@pytest.fixture
def finished(make_spec):
    import fake_stage

    spec = make_spec()
    store.write_spec(spec)
    execute(spec, fake_stage.run)
    return spec


def test_a_finished_result_is_found(finished):
    manifest = store.find(finished)
    assert isinstance(manifest, Manifest)
    assert set(manifest.outputs) == {"metrics.jsonl", "deep/out.txt", "provenance.json"}
    # sha256sum of the text "fake 0\n", by coreutils
    assert manifest.outputs["deep/out.txt"] == {
        "bytes": 7,
        "sha256": "cf1cf823225677dd2e7a031ae2c97e20eb8c4f116057d9ed663e362d89c6f809",
        "mtime_ns": (finished.directory / "deep/out.txt").stat().st_mtime_ns,
    }
    assert manifest.path("deep/out.txt").read_text() == "fake 0\n"
    assert manifest.environment["libraries"]["numpy"]
    assert len(manifest.environment["code_sha256"]) == 64
    assert manifest.started <= manifest.finished
    assert store.verify(finished.directory) == []
    with pytest.raises(InputError, match=r"lists no file gone\.bin"):
        manifest.path("gone.bin")


def test_not_done_yet(make_spec):
    assert store.check(make_spec()) == (None, "not done yet")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_text("fake 0\n\n"), "8 bytes where the manifest says 7"),
        (lambda file: file.write_text("fake 1\n"), "SHA-256 is"),
    ],
)
def test_damage_is_noticed_with_a_reason(finished, damage, reason):
    file = finished.directory / "deep" / "out.txt"
    damage(file)
    if file.exists():
        os.utime(file, ns=(1, 1))
    manifest, why = store.check(finished)
    assert manifest is None
    assert reason in why
    assert str(file) in why
    assert [reason in sentence for sentence in store.verify(finished.directory)] == [True]


def test_another_time_with_the_same_bytes_is_no_damage(finished):
    os.utime(finished.directory / "deep" / "out.txt", ns=(1, 1))
    assert store.find(finished) is not None


def test_damage_behind_the_same_size_and_time_is_left_to_verify(finished):
    file = finished.directory / "deep" / "out.txt"
    status = file.stat()
    file.write_text("fake 1\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.find(finished) is not None
    assert len(store.verify(finished.directory)) == 1


def test_verify_names_foreign_files_and_a_missing_manifest(finished):
    (finished.directory / "extra.bin").touch()
    assert "extra.bin: not listed" in store.verify(finished.directory)[0]
    (finished.directory / "manifest.json").unlink()
    assert "no such file" in store.verify(finished.directory)[0]


def test_a_manifest_of_another_result_is_refused(finished, make_spec):
    other = make_spec(value=1)
    shutil.copytree(finished.directory, other.directory)
    manifest, why = store.check(other)
    assert manifest is None
    assert finished.name in why


def test_a_cut_manifest_counts_as_not_done(finished):
    file = finished.directory / "manifest.json"
    file.write_text(file.read_text()[:100])
    manifest, why = store.check(finished)
    assert manifest is None
    assert "not readable as JSON" in why


def test_a_store_can_be_moved(finished, tmp_path):
    shutil.move(tmp_path / "store", tmp_path / "new" / "store")
    manifest = store.read_manifest(tmp_path / "new" / "store" / finished.name)
    assert store.find(manifest.spec) is not None
    assert manifest.path("deep/out.txt").is_file()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    store.write_json(tmp_path / "a.json", {"a": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(Exception, match="No space left"):
            store.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(tmp_path / "a.json", {"a": float("nan")})


def test_a_whole_result_is_not_made_again(finished, make_spec):
    import fake_stage

    before = store.find(finished)
    assert execute(make_spec(do="crash"), fake_stage.run).to_json() == before.to_json()


def test_what_is_damaged_is_told_and_never_gone_on_from(finished, make_spec, capsys):
    """The stage appends to metrics.jsonl, as a training does: the damaged lines must not stay."""
    import fake_stage

    before = store.find(finished)
    file = finished.directory / "metrics.jsonl"
    file.write_text(file.read_text().replace("3.0", "3.1"))
    os.utime(file, ns=(1, 1))
    after = execute(make_spec(), fake_stage.run)
    assert capsys.readouterr().out.startswith(f"{file}: its SHA-256 is ")
    assert after.outputs["metrics.jsonl"]["sha256"] == before.outputs["metrics.jsonl"]["sha256"]
    manifest = finished.directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace("finished", "finishes"))
    execute(make_spec(), fake_stage.run)
    assert f"{manifest}: does not match its own digest, the file is damaged; remove it and" in capsys.readouterr().out
    assert store.verify(finished.directory) == []


@pytest.fixture
def trained(make_spec):
    """A finished stage with the checkpoints 3 and 6; damage(step) flips a byte of one's data."""
    import fake_stage

    spec = make_spec()
    store.write_spec(spec)
    with Checkpointer(spec.directory / "checkpoints", keep_latest=2, asynchronous=False) as saver:
        for step in (3, 6):
            saver.save(step, {"state": {"x": np.full(8, step, np.float32)}}, meta={})
    execute(spec, fake_stage.run)

    def damage(step: int) -> Path:
        arrays = (spec.directory / "checkpoints" / str(step) / "state").glob("**/d/*")
        file = max(arrays, key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))  # or else sizes and times are trusted
        return file

    return spec, damage


def test_no_new_manifest_vouches_for_a_damaged_checkpoint(trained, make_spec, capsys):
    import fake_stage

    spec, damage = trained
    file = damage(3)
    manifest = execute(make_spec(), fake_stage.run)
    said = capsys.readouterr().out
    assert f"{file}: has changed: its sha256 is " in said
    assert "; this checkpoint is removed, another is whole." in said
    assert not (spec.directory / "checkpoints" / "3").exists()
    assert any(name.startswith("checkpoints/6/") for name in manifest.outputs)
    assert verification.verify_stage(spec.directory) == []


def test_the_last_evidence_is_kept(trained):
    spec, damage = trained
    files = {damage(3), damage(6)}
    said = store.discard_damaged(spec.directory)
    assert len(said) == 2
    assert all(line.endswith("; no other checkpoint is whole.") for line in said)
    assert all(file.exists() for file in files)


def test_damage_that_a_manifest_vouches_for_is_found(trained):
    """As one written after the damage would: what each checkpoint says of itself is asked too."""
    spec, damage = trained
    file = damage(3)
    old = store.read_manifest(spec.directory)
    store.write_manifest(spec, old.results, seconds=1.0, started=datetime.now(UTC), environment={})
    assert store.verify(spec.directory) == []
    (found,) = verification.verify_stage(spec.directory)
    assert found.startswith(f"{file}: has changed")
    assert found.endswith(f"; remove {spec.directory / 'checkpoints' / '3'} and run the stage again.")


@pytest.mark.parametrize("manifest", ["absent", "damaged", "vouches"])
def test_a_damaged_checkpoint_goes_whatever_the_manifest_says(trained, make_spec, capsys, manifest):
    import fake_stage

    spec, damage = trained
    file, own = damage(3), spec.directory / "manifest.json"
    if manifest == "absent":
        own.unlink()
    elif manifest == "damaged":
        own.write_text(own.read_text().replace("finished", "finishes"))
    else:
        old = store.read_manifest(spec.directory)
        store.write_manifest(spec, old.results, seconds=1.0, started=datetime.now(UTC), environment={})
        (spec.directory / "deep" / "out.txt").unlink()  # or else there is nothing to do
    execute(make_spec(), fake_stage.run)
    said = capsys.readouterr().out
    assert f"{file}: has changed" in said
    assert "; this checkpoint is removed, another is whole." in said
    assert [path.name for path in (spec.directory / "checkpoints").glob("[0-9]*")] == ["6"]
    assert verification.verify_stage(spec.directory) == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["deep/out.txt", "metrics.jsonl", "checkpoints/6"])
def test_what_cannot_be_read_is_no_damage_and_stays(trained, make_spec, monkeypatch, number, name):
    """A server that is away, say. Beside it is real damage, which must wait."""
    import fake_stage

    spec, damage = trained
    damage(3)
    victim = spec.directory / name
    if victim.is_dir():
        (spec.directory / "manifest.json").unlink()  # its own digests are asked then, too
        victim = next(victim.glob("state/**/d/*"))
    os.utime(victim, ns=(1, 1))
    read = hashlib.file_digest

    def fail(file, kind):
        if Path(file.name) == victim:
            raise OSError(number, os.strerror(number))
        return read(file, kind)

    before = {path: path.read_bytes() for path in spec.directory.rglob("*") if path.is_file() and path.name != ".lock"}
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fail)
        with pytest.raises(DiskError, match=f"{re.escape(str(victim))}: cannot be read .*; check the disk"):
            execute(make_spec(), fake_stage.run)
        told = [line for line in verification.verify_stage(spec.directory) if line.startswith(str(victim))]
        assert [line.endswith("; check the disk and the permissions.") for line in told] == [True]
    after = {path: path.read_bytes() for path in spec.directory.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_file_whose_place_cannot_be_looked_at_is_not_called_missing(finished, monkeypatch):
    victim, look = finished.directory / "deep" / "out.txt", Path.stat

    def fail(path, **options):
        if path == victim:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return look(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", fail)
        with pytest.raises(DiskError, match=r"out\.txt: cannot be read \(Stale file handle\)"):
            store.check(finished)
        with pytest.raises(DiskError, match=r"out\.txt: cannot be read"):
            store.discard_damaged(finished.directory)
    assert victim.read_text() == "fake 0\n"


def test_a_damaged_record_of_training_is_set_aside(finished, make_spec, capsys):
    """It cannot be made again: what one byte spoils may be all that is known of a long training."""
    import fake_stage

    def train(spec, inputs):
        return fake_stage.run(spec, inputs) | {"notes": ["its own"]}

    file = finished.directory / "metrics.jsonl"
    spoilt = file.read_text().replace("3.0", "3.1")
    file.write_text(spoilt)
    os.utime(file, ns=(1, 1))
    note, own = execute(make_spec(), train).results["notes"]
    assert note.startswith("metrics.jsonl: its SHA-256 is ")
    assert note.endswith("; it is set aside as metrics.jsonl.damaged.part, and begun anew where training goes on.")
    assert own == "its own"
    assert f"{finished.directory}/{note}\n" in capsys.readouterr().out
    assert (finished.directory / "metrics.jsonl.damaged.part").read_text() == spoilt
    assert store.verify(finished.directory) == []


def test_a_failed_stage_has_no_manifest_not_even_its_old_one(finished, make_spec):
    import fake_stage

    (finished.directory / "deep" / "out.txt").unlink()
    with pytest.raises(RuntimeError):
        execute(make_spec(do="crash"), fake_stage.run)
    assert store.check(finished) == (None, "not done yet")


def test_digest_of_a_directory_sees_names_and_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.txt").write_text("1")
        (tmp_path / name / ".hidden").write_text(name)
    assert store.digest(tmp_path / "a") == store.digest(tmp_path / "b")
    (tmp_path / "b" / "one.txt").rename(tmp_path / "b" / "two.txt")
    assert store.digest(tmp_path / "a") != store.digest(tmp_path / "b")
    # SHA-256 of the byte "1": coreutils' sha256sum
    assert store.digest(tmp_path / "a" / "one.txt").startswith("6b86b273ff34fce1")
    with pytest.raises(InputError, match="no such file, or an empty directory"):
        store.digest(tmp_path / "c")
