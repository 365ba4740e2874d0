"""The gate and the publication, outside Prefect."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from flows import gate, lineage, publish
from jaxlm.config import RunConfig, load
from jaxlm.errors import DivergedError, InputError, UnavailableError
from jaxlm.launch_config import GateConfig, PublishConfig
from jaxlm.stages import store

CHECKOUT = Path(__file__).parent.parent.parent
RESULTS = {"val_loss": 1.5, "accuracy_by_type": {"who": {"after": 0.75}}, "name": "probe", "ok": True}


def test_bounds_that_are_kept_and_missed():
    bounds = ["val_loss<=1.5", "accuracy_by_type.who.after > 0.5"]
    assert gate.check(RESULTS, bounds) == [
        "val_loss is 1.5, and gate.bounds wants val_loss <= 1.5",
        "accuracy_by_type.who.after is 0.75, and gate.bounds wants accuracy_by_type.who.after > 0.5",
    ]
    with pytest.raises(
        DivergedError, match=r"^gate: val_loss is 1\.5, and gate\.bounds wants val_loss < 1\.5; "
    ) as caught:
        gate.check(RESULTS, ["val_loss<1.5", *bounds])
    assert caught.value.exit_code == 70
    with pytest.raises(DivergedError):
        gate.check({"val_loss": math.nan}, ["val_loss<=9"])
    for name in ("perplexity", "name", "ok", "accuracy_by_type.who"):
        with pytest.raises(InputError, match=f"the evaluation has no figure {name}; it has val_loss"):
            gate.check(RESULTS, [f"{name}>0"])


def test_a_bound_that_cannot_be_read_is_told_with_the_configuration(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("gate: {bounds: ['val_loss = 3']}\n")
    with pytest.raises(InputError, match=r"gate\.bounds: expected metric<=number"):
        load(file)
    assert load(file, ["gate.bounds=['val_loss<=3e-1']"]).gate == GateConfig(bounds=("val_loss<=3e-1",))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "from").mkdir()
    out = {}
    for key in ("model/a.bin", "report/report.md"):
        file = tmp_path / "from" / Path(key).name
        file.write_bytes(key.encode())
        out[key] = file
    return out


def test_a_directory_appears_whole_or_not_at_all(tmp_path, files, monkeypatch):
    to = str(tmp_path / "out")
    copied = []
    copy = publish.shutil.copyfile

    def full(source, target):
        assert not (tmp_path / "out" / "probe-1").exists()
        copied.append(target)
        if len(copied) == 2:
            raise OSError(28, "No space left on device")
        return copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(publish.shutil, "copyfile", full)
        with pytest.raises(Exception, match="No space left"):
            publish.put(files, to, "probe-1", {"run": "probe"})
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / ".probe-1.part" / "model").mkdir(parents=True)  # a publication was killed in the middle
    (tmp_path / "out" / ".probe-1.part" / "model" / "half.bin").touch()
    where = publish.put(files, to, "probe-1", {"run": "probe"})
    assert where == f"{to}/probe-1"
    assert Path(where, "model", "a.bin").read_bytes() == b"model/a.bin"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["probe-1"]
    assert sorted(path.name for path in Path(where).iterdir()) == ["model", "published.json", "report"]
    assert [path.name for path in Path(where, "model").iterdir()] == ["a.bin"]
    index = json.loads(Path(where, "published.json").read_text())
    assert index["files"]["model/a.bin"] == {"bytes": 11, "sha256": hashlib.sha256(b"model/a.bin").hexdigest()}
    before = Path(where, "published.json").stat().st_mtime_ns
    assert publish.put(files, to, "probe-1", {"run": "probe"}) == where
    assert Path(where, "published.json").stat().st_mtime_ns == before
    files["model/a.bin"].write_text("changed")
    with pytest.raises(InputError, match="another publication is there"):
        publish.put(files, to, "probe-1", {"run": "probe"})
    (tmp_path / "out" / "probe-2").mkdir()
    with pytest.raises(InputError, match="something that is no publication is there"):
        publish.put(files, to, "probe-2", {"run": "probe"})


def test_what_appears_is_on_the_disk(tmp_path, files, monkeypatch):
    """Every file and folder is forced there before the rename that makes the whole appear."""
    synced, at_rename = [], []
    fsync, rename = publish.os.fsync, publish.os.rename

    def note(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source, target):
        at_rename.extend(synced)
        rename(source, target)

    monkeypatch.setattr(publish.os, "fsync", note)
    monkeypatch.setattr(publish.os, "rename", renamed)
    publish.put(files, str(tmp_path / "out"), "probe-1", {"run": "probe"})
    expected = {"a.bin", "report.md", ".published.json.tmp", "model", "report", ".probe-1.part"}
    assert expected <= set(at_rename)
    assert synced[-1] == "out"


def test_in_a_bucket_the_index_comes_last(files, monkeypatch):
    memory = fsspec.filesystem("memory")
    where = publish.put(files, "memory://bucket/models", "probe-1", {"run": "probe"})
    assert where == "memory:///bucket/models/probe-1"
    assert sorted(memory.find("/bucket/models/probe-1")) == [
        f"/bucket/models/probe-1/{name}" for name in ("model/a.bin", "published.json", "report/report.md")
    ]

    def cut_off(self, source, target, **_):
        raise ConnectionResetError("the service went away")

    monkeypatch.setattr(type(memory), "put_file", cut_off)
    with pytest.raises(UnavailableError, match="the service did not take it"):
        publish.put(files, "memory://bucket/models", "probe-2", {"run": "probe"})
    assert not memory.exists("/bucket/models/probe-2/published.json")
    files["model/a.bin"].write_text("changed")  # nothing is put over a publication, file by file
    with pytest.raises(InputError, match="another publication is there"):
        publish.put(files, "memory://bucket/models", "probe-1", {"run": "probe"})
    memory.rm("/bucket", recursive=True)


def test_a_place_that_does_not_exist(files):
    with pytest.raises(InputError, match=r"^publish\.to=nosuch://x: no such kind of file system"):
        publish.put(files, "nosuch://x", "probe-1", {})


def test_a_run_is_published_with_its_report_and_lineage(letters_run, tmp_path):
    from jaxlm import chat

    done = list(letters_run.manifests.values())
    cfg = letters_run.cfg
    lineage.write(cfg, str(letters_run.config), done)
    try:
        where = publish.export(cfg, str(tmp_path), done)
    finally:
        (letters_run.root / "runs" / cfg.name / "lineage.json").unlink()
    assert {path.name for path in Path(where).iterdir()} == {"model", "report", "lineage.json", "published.json"}
    assert (Path(where) / "report" / "report.md").exists()
    found = chat.load_model(f"{where}/model", tmp_path)
    assert (found.cfg.kind, found.cfg.vocab_size) == ("bigram", done[1].results["vocab_size"])
    assert not list((letters_run.root / "runs" / cfg.name).glob(".publish*"))


def test_what_is_damaged_is_not_published(letters_run, tmp_path):
    """A byte that changes on the disk leaves size and time as they were, by which a result is found."""
    root = tmp_path / "root"
    shutil.copytree(letters_run.root, root, symlinks=True)
    cfg = letters_run.cfg.replace(root=str(root))
    done = [store.read_manifest(root / "store" / each.spec.name) for each in letters_run.manifests.values()]
    model, report = done[-2], done[-1]
    for manifest, name in [
        (model, max(model.outputs, key=lambda key: model.outputs[key]["bytes"])),
        (report, "report.md"),
    ]:
        file = manifest.path(name)
        before, whole = file.stat(), file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert store.find(manifest.spec) is not None
        with pytest.raises(
            InputError, match=rf"^publish: {file}: its SHA-256 is .*; remove that file and run the same"
        ):
            publish.export(cfg, str(tmp_path / "out"), done)
        file.write_bytes(whole)
    spec = model.directory / "spec.json"
    spec.write_text(spec.read_text().replace('"steps": 12', '"steps": 13'))
    with pytest.raises(InputError, match=f"^{spec}: "):
        publish.export(cfg, str(tmp_path / "out"), done)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_export_does_not_outlive_the_flow(letters_run, tmp_path, processes):
    """publish.form=hf makes its files in a process, which must see the flow's die."""
    code = (
        "import sys; from pathlib import Path; from flows import publish; from jaxlm.stages.store import read_manifest;"
        "publish._EXPORT = publish._EXPORT.partition(' from jaxlm.cli')[0] + ' import time; time.sleep(999)';"
        "publish._hf(read_manifest(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    model = letters_run.manifests["pretrain"].directory
    flow = subprocess.Popen([sys.executable, "-c", code, model, tmp_path / "work"], cwd=CHECKOUT)

    def listens():
        found = processes.descendants(flow.pid)
        return [pid for pid in found if len(list(Path(f"/proc/{pid}/task").iterdir())) > 1]  # its watch has started

    try:
        assert processes.wait_until(listens, processes.patience)
        export = listens()
    finally:
        flow.kill()
        flow.wait()
    assert processes.wait_until(lambda: not any(map(processes.running, export)), processes.patience)


def test_lineage_is_a_graph_from_the_users_files_to_the_report(letters_run, tmp_path):
    cfg = letters_run.cfg.replace(root=str(tmp_path))
    made = lineage.write(cfg, "letters.yaml", list(letters_run.manifests.values()))
    stages = {stage["stage"]: stage for stage in json.loads(made.read_text())["stages"]}
    assert list(stages) == ["download", "tokenize", "pretrain", "evaluate"]
    for stage in stages.values():
        for item in stage["inputs"].values():
            assert stages[item["stage"]]["id"] == item["id"]
    digest = hashlib.sha256((letters_run.root / "letters.txt").read_bytes()).hexdigest()
    assert stages["download"]["files"]["data.path"] == digest
    assert stages["pretrain"]["settings"]["train"]["steps"] == 12
    assert stages["pretrain"]["code_sha256"]


def test_none_of_this_decides_a_result():
    from jaxlm.stages.plan import plan

    before = [spec.id for spec in plan(RunConfig())]
    changed = RunConfig(
        gate=GateConfig(bounds=("val_loss<=1",)),
        publish=PublishConfig(to="x"),
        launch={"kind": "slurm", "processes": 2},
    )
    assert [spec.id for spec in plan(changed)] == before
