"""Why two runs differ, and whether a run is what was written."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from jaxlm import cli_runs
from jaxlm._sealed import read_sealed, write_sealed
from jaxlm.config import RunConfig
from jaxlm.errors import InputError
from jaxlm.stages import diff, provenance, runs, store, verification
from jaxlm.stages.process import execute
from jaxlm.stages.spec import Spec


@pytest.fixture
def make_run(tmp_path, fake_modules):
    """make_run(name, text=0, model=0, **options) -> a run of two fake stages, the second of which reads the first."""
    import fake_stage

    def make(name, *, text=0, model=0, finish=True, **options):
        cfg = RunConfig(root=str(tmp_path), name=name)
        first = Spec("tokenize", 1, {"value": text}, root=str(tmp_path), module="fake_stage")
        second = Spec("evaluate", 1, {"value": model}, inputs={"tokenize": first.as_input()}, options=options,
                      root=str(tmp_path), module="fake_stage")  # fmt: skip
        for spec in (first, second):
            store.write_spec(spec)
            runs.record(cfg, "", execute(spec, fake_stage.run))
        return tmp_path / "runs" / name

    return make


def kinds(found):
    return {(d.stage, d.kind, d.what) for d in found}


def test_what_a_stage_was_made_with_is_kept_from_its_start(make_run, tmp_path):
    folder = make_run("a", text=3, log_every=5)
    (first,) = tmp_path.glob("store/tokenize-*")
    (second,) = tmp_path.glob("store/evaluate-*")
    kept = read_sealed(second / "provenance.json")
    assert kept["settings"] == {"value": 0, "log_every": 5}
    assert kept["environment"]["libraries"]["numpy"]
    assert len(kept["environment"]["code_sha256"]) == 64
    assert "devices" not in kept["environment"]  # to look at them is to start them
    assert kept["inputs"]["tokenize"]["stage"] == first.name
    # the very digests of the data that was read
    assert kept["inputs"]["tokenize"]["files"]["deep/out.txt"] == store.digest(first / "deep" / "out.txt")
    provenance.add(second, devices={"count": 2}, layout={"data": 2})
    assert read_sealed(second / "provenance.json") == kept | {"devices": {"count": 2}, "layout": {"data": 2}}
    assert verification.verify_place(folder) == [
        f"{second / 'provenance.json'}: {(second / 'provenance.json').stat().st_size} bytes where the manifest says "
        f"{store.read_manifest(second).outputs['provenance.json']['bytes']}."
    ]


def test_a_setting_is_the_reason_and_what_follows_is_listed(make_run, tmp_path):
    a, b = make_run("a", text=1, model=4), make_run("b", text=2, model=4)
    found = diff.differences(a, b)
    assert {("tokenize", "setting", "value"), ("tokenize", "output", "deep/out.txt"),
            ("evaluate", "input", "tokenize"), ("evaluate", "output", "deep/out.txt")} == kinds(found)  # fmt: skip
    text = diff.report(a, b)
    assert text.startswith("They differ from tokenize on: setting value is 1 in the one and 2 in the other.\n")
    assert "  setting value" in text


def test_the_same_result_is_the_same_and_an_option_decides_nothing(make_run, tmp_path):
    a, b = make_run("a"), make_run("b")
    assert diff.report(a, b) == f"{a} and {b} are the same result."
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "store", other / "store")
    (evaluate,) = other.glob("store/evaluate-*")
    spec = read_sealed(evaluate / "spec.json")
    write_sealed(evaluate / "spec.json", spec | {"options": {"log_every": 9}})
    (ours,) = tmp_path.glob("store/evaluate-*")
    assert kinds(diff.differences(ours, evaluate)) == {("evaluate", "option", "log_every")}
    assert "nothing that decides a result" in diff.report(ours, evaluate)


def test_libraries_devices_code_and_losses_are_told(make_run, tmp_path):
    make_run("a")
    (ours,) = tmp_path.glob("store/evaluate-*")
    theirs = tmp_path / "elsewhere" / "store" / ours.name
    shutil.copytree(ours, theirs)
    manifest = read_sealed(theirs / "manifest.json")
    manifest["environment"]["libraries"]["numpy"] = "0.1"
    manifest["environment"]["git"] = {"commit": "abc", "dirty": True}
    write_sealed(theirs / "manifest.json", manifest)
    provenance.add(theirs, layout={"data": 8})
    lines = [json.loads(line) for line in (theirs / "metrics.jsonl").read_text().splitlines()]
    lines[1]["loss"] += 2**-40
    (theirs / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = diff.differences(ours, theirs)
    assert ("evaluate", "library", "numpy") in kinds(found)
    assert ("evaluate", "code", "git.commit") in kinds(found)
    assert ("evaluate", "machine", "layout.data") in kinds(found)
    (loss,) = [d for d in found if d.kind == "metrics"]
    assert (loss.what, loss.ours, loss.theirs) == ("loss from step 1 on", "2.0", repr(2 + 2**-40))


def test_a_stage_that_never_finished_can_be_compared(make_run, tmp_path):
    make_run("a", model=1)
    b = make_run("b", model=2)
    (_, unfinished) = (p for p in runs.stages_of(b).values())
    (unfinished / "manifest.json").unlink()
    assert ("evaluate", "setting", "value") in kinds(diff.differences(tmp_path / "runs" / "a", b))


def test_what_cannot_be_compared_is_named(make_run, tmp_path):
    make_run("a")
    first, second = tmp_path.glob("store/*")
    with pytest.raises(InputError, match="compare two of a kind"):
        diff.differences(first, second)
    with pytest.raises(InputError, match="neither a run nor a stage"):
        diff.differences(first, tmp_path / "store")
    (second / "spec.json").write_text((second / "spec.json").read_text().replace('"value": 0', '"value": 1'))
    with pytest.raises(InputError, match=r"spec\.json: does not match its own digest"):
        diff.differences(tmp_path / "runs" / "a", second)


def test_the_commands(make_run, tmp_path, capsys):
    make_run("a", model=1)
    make_run("b", model=2)
    cli_runs.diff("a", "b", root=tmp_path)
    assert "setting value is 1 in the one and 2 in the other" in capsys.readouterr().out
    cli_runs.verify("a", root=tmp_path)
    assert "2 stages, every file as it was written" in capsys.readouterr().out
    cli_runs.verify("a/evaluate", root=tmp_path)
    assert "1 stages" in capsys.readouterr().out
    (tmp_path / "runs" / "a" / "report.md").write_text("better")
    with pytest.raises(InputError, match=r"report\.md: is not the report\.md that .* made\.$"):
        cli_runs.verify("a", root=tmp_path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda a, b: shutil.copyfile(b / "run.json", a / "run.json"), "run.json: is of the run 'b'"),
        (lambda a, b: (a / "report.json").unlink(), "report.json: missing"),
        (lambda a, b: (a / "run.json").write_text("{"), "run.json: not readable"),
        (lambda a, b: [(a / "tokenize").unlink(), (a / "tokenize").symlink_to(b)], "tokenize: points at"),
        (lambda a, b: os.truncate((a / "evaluate").resolve() / "spec.json", 50), "spec.json: not readable"),
        (lambda a, b: ((a / "evaluate").resolve() / "spec.json").unlink(), "spec.json: no such file"),
        (
            lambda a, b: [
                shutil.copyfile((b / x).resolve() / "manifest.json", (a / x).resolve() / "manifest.json")
                for x in ["evaluate"]
            ],
            "manifest.json: is of evaluate-",
        ),
    ],
)
def test_damage_to_a_runs_own_notes_is_named(make_run, harm, said):
    a, b = make_run("a", model=1), make_run("b", model=2)
    assert verification.verify_place(a) == []
    harm(a, b)
    found = verification.verify_place(a)
    assert any(re.search(re.escape(said), sentence) for sentence in found), found


def test_a_stage_that_has_not_finished_is_looked_through_too(make_run, tmp_path):
    """Its manifest is missing: what carries digests of its own is verified, and nothing is to be deleted."""
    from jaxlm._digests import Manifest, write_manifest

    run = make_run("a", model=1)
    stage = runs.stages_of(run)["evaluate"]
    (stage / "manifest.json").unlink()
    for step in (3, 6):
        (stage / "checkpoints" / str(step)).mkdir(parents=True)
        (stage / "checkpoints" / str(step) / "data").write_text("weights")
        write_manifest(stage / "checkpoints" / str(step), Manifest(step, {}, None, {}, {}))
    unfinished = f"{stage}: has not finished, or its manifest.json was removed; whole checkpoints: 3, 6; run the same"
    (found,) = verification.verify_place(run)[:1]
    assert found.startswith(unfinished)
    (stage / "checkpoints" / "6" / "data").write_text("Weights")
    os.truncate(stage / "provenance.json", 100)
    found = verification.verify_place(stage)
    assert [sentence.partition(": ")[0] for sentence in found] == [
        str(stage / "provenance.json"), str(stage / "checkpoints" / "6" / "data"), str(stage)
    ]  # fmt: skip
    assert "whole checkpoints: 3; run" in found[-1]


def test_neither_a_run_nor_a_stage(tmp_path):
    with pytest.raises(InputError, match="neither a run nor a stage"):
        verification.verify_place(tmp_path)
