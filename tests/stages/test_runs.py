from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm.config import EvalConfig, RunConfig
from jaxlm.errors import InputError
from jaxlm.stages import runs, store
from jaxlm.stages.process import execute


@pytest.fixture
def run(make_spec, tmp_path):
    import fake_stage

    cfg = RunConfig(name="first", root=str(tmp_path))
    specs = [make_spec("pretrain"), make_spec("evaluate")]
    for spec in specs:
        store.write_spec(spec)
        runs.record(cfg, "configs/first.yaml", execute(spec, fake_stage.run))
    return cfg, specs


def test_a_run_points_at_its_stages_and_holds_its_report(run, tmp_path):
    cfg, specs = run
    folder = tmp_path / "runs" / "first"
    for spec in specs:
        assert (folder / spec.stage).is_symlink()
        assert (folder / spec.stage).resolve() == spec.directory.resolve()
    assert (folder / "report.md").read_text().startswith("# Report")
    assert not (folder / "report.html").exists()
    notes = json.loads((folder / "run.json").read_text())
    assert notes["stages"] == {spec.stage: f"../../store/{spec.name}" for spec in specs}
    assert notes["config_name"] == "configs/first.yaml"
    assert RunConfig.model_validate(notes["config"]) == cfg


def test_two_flows_of_a_run_note_a_stage_each(make_spec, tmp_path, monkeypatch):
    """The notes are read, added to and written by one at a time: reading is made slow, so both would read the old."""
    import fake_stage

    read = runs.read_sealed

    def slowly(path):
        try:
            return read(path)
        finally:
            time.sleep(0.2)

    cfg = RunConfig(name="first", root=str(tmp_path))
    done = []
    for stage in ("download", "pretrain", "evaluate"):
        store.write_spec(spec := make_spec(stage))
        done.append(execute(spec, fake_stage.run))
    runs.record(cfg, "", done.pop(0))
    monkeypatch.setattr(runs, "read_sealed", slowly)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda manifest: runs.record(cfg, "", manifest), done))
    assert sorted(runs.stages_of(tmp_path / "runs" / "first")) == ["download", "evaluate", "pretrain"]


def test_another_configuration_starts_the_notes_afresh(run, tmp_path, make_spec):
    cfg, specs = run
    other = cfg.replace(eval=EvalConfig(n_questions=1))
    runs.record(other, "", store.read_manifest(specs[0].directory))
    folder = tmp_path / "runs" / "first"
    assert list(runs.stages_of(folder)) == ["pretrain"]
    assert not (folder / "report.md").exists()
    assert not (folder / "evaluate").is_symlink()


def test_resolve(run, tmp_path, monkeypatch):
    _, specs = run
    folder = tmp_path / "runs" / "first"
    assert runs.resolve("first", tmp_path) == folder
    assert runs.resolve(folder, tmp_path) == folder
    assert runs.resolve("first/pretrain", tmp_path).resolve() == specs[0].directory.resolve()
    assert runs.resolve(specs[0].name, tmp_path) == specs[0].directory
    assert runs.resolve("first", tmp_path, stages=("sft", "pretrain")) == specs[0].directory.resolve()
    monkeypatch.chdir(tmp_path)
    assert runs.resolve("store", ".").resolve() == tmp_path / "store"
    with pytest.raises(InputError, match="no sft stage yet; it has pretrain, evaluate"):
        runs.resolve("first", tmp_path, stages=("sft",))
    with pytest.raises(InputError, match=r"^fist: no such run, stage or directory; did you mean first\?$"):
        runs.resolve("fist", tmp_path)
    with pytest.raises(InputError, match="the runs here are first"):
        runs.resolve("xyz", tmp_path)
    with pytest.raises(InputError, match=r"there are no runs in .* yet"):
        runs.resolve("xyz", tmp_path / "empty")
