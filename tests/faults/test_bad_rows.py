"""Rows of the table of bad input (docs/faults.md) that no other test holds, and the table itself."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import harness
import pytest

from jaxlm.config import RunConfig, load, validated
from jaxlm.errors import InputError, Preempted
from jaxlm.stages.plan import plan
from jaxlm.stages.runner import run_chain, run_stage
from jaxlm.stages.store import read_manifest, write_spec
from jaxlm.stages.verification import verify_place

QUICK_COMPILE = True
TABLE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"learning_rate": -1e-3}}, "train.learning_rate: "),
        ({"train": {"muon_learning_rate": float("nan")}}, "train.muon_learning_rate: "),
        ({"train": {"steps": 5, "warmup_steps": 6}}, "warmup_steps=6 must be below steps=5"),
        ({"sft": {"train": {"batch_size": 6, "grad_accum_steps": 4}}}, "grad_accum_steps=4 must divide batch_size=6"),
    ],
)
def test_a_configuration_that_cannot_be(values, said):
    with pytest.raises(InputError) as caught:
        validated(RunConfig, values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_that_changed_since_the_run_began_is_refused_when_it_continues(letters_run, tmp_path, monkeypatch):
    """A shard changes, its size and time as they were, between two processes of one training."""
    shutil.copytree(letters_run.root / "store", tmp_path / "store", copy_function=shutil.copy2)
    cfg = load(letters_run.config, ["train.learning_rate=0.3"]).replace(root=str(tmp_path))
    spec = next(spec for spec in plan(cfg) if spec.stage == "pretrain")
    write_spec(spec)
    tokens = read_manifest(spec.input_directory("tokenize"))
    shard = tokens.path(tokens.results["indexes"]["train"]["shards"][0]["file"])

    from contextlib import nullcontext

    from jaxlm.stages import fitting
    from jaxlm.train.stopping import Stop

    asked = iter([False] * 3 + [True] * 9)
    monkeypatch.setattr(fitting, "stop_requested", lambda directory: nullcontext(Stop(lambda: next(asked))))
    with pytest.raises(Preempted):
        run_stage(spec, launcher="inline", echo=quiet)
    monkeypatch.undo()
    saved = harness.saved_steps(spec.directory)
    assert saved
    with (
        harness.damaged(shard, "flip"),
        pytest.raises(InputError, match=rf"{shard.name}: its SHA-256 is .* run the st"),
    ):
        run_stage(spec, launcher="inline", echo=quiet)
    assert harness.saved_steps(spec.directory) == saved
    run_stage(spec, launcher="inline", echo=quiet)  # as it was: it goes on


@pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_paths_with_spaces_and_other_scripts_and_relative_ones(letters_run, tmp_path, monkeypatch, relative):
    text = tmp_path / "mein Text – 数据.txt"
    text.write_text("the cat sat on the mat; the dog sat on the log. " * 8)
    root = tmp_path / "a folder" / "données-数据"
    root.mkdir(parents=True)
    monkeypatch.chdir(root)
    overrides = ["train.steps=2", "train.sample_tokens=0", "eval.n_samples=0"]
    cfg = load(letters_run.config, overrides)
    cfg = cfg.replace(
        root="." if relative else str(root),
        data=cfg.data.replace(path=os.path.relpath(text) if relative else str(text)),
    )
    run_chain(cfg, echo=quiet)
    (run,) = root.glob("runs/*")
    assert verify_place(run) == []
    assert (run / "report.md").is_file()
    assert all(cached for _, cached in run_chain(cfg, echo=quiet))


def test_a_read_only_root_is_named(letters_run):
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    root = parent / "read only"
    root.mkdir(mode=0o555)
    user = os.geteuid()
    cfg = load(letters_run.config).replace(root=str(root))
    try:
        spec = plan(cfg)[0]
        if user == 0:
            os.seteuid(65534)  # the superuser may write anywhere
        with pytest.raises(InputError, match=r"cannot make a stage in .*read only.*: Permission denied; choose a dir"):
            run_stage(spec, launcher="inline", echo=quiet)
    finally:
        os.seteuid(user)
        shutil.rmtree(parent)


def test_every_row_of_the_table_names_tests_that_exist():
    checkout = TABLE.parents[1]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE.read_text(encoding="utf-8"))
    assert len(named) > 50
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (checkout / file).is_file() or not re.search(rf"def {test}\(", (checkout / file).read_text())
    ]
    assert missing == []
