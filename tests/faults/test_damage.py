"""Every file of a finished run, damaged in five ways: named by `verify`, refused by the stage that would read it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import harness
import pytest

from jaxlm.config import load
from jaxlm.errors import InputError
from jaxlm.stages import process, store, verification
from jaxlm.stages.runner import run_chain
from jaxlm.stages.spec import Spec

QUICK_COMPILE = True

# Told to people, read by nobody: what happens to them changes nothing.
UNREAD = {".lock", "log.txt"}


@pytest.fixture(scope="module")
def two(letters_run, tmp_path_factory) -> tuple[Path, Path]:
    """The roots of two runs, of other texts in the same letters, so that both are compiled once."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    shutil.copytree(letters_run.root, ours, symlinks=True, dirs_exist_ok=True, copy_function=shutil.copy2)
    text = theirs / "other.txt"
    text.write_text("the dog sat on the mat; the cat sat on the log. " * 40)
    cfg = load(letters_run.config, [f"data.path={text}", "seed=1"]).replace(root=str(theirs))
    run_chain(cfg, echo=lambda line: None)
    return ours, theirs


def files(place: Path) -> list[Path]:
    """All regular files, of the store by their stage; links are what they point at."""
    return sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())


def counterpart(path: Path, ours: Path, theirs: Path) -> Path:
    """The file in the same place of the other run; of those with names drawn at random, one of the same kind."""
    stage, *rest = path.relative_to(ours / "store").parts
    (other,) = theirs.glob(f"store/{stage.partition('-')[0]}-*")
    same = other.joinpath(*rest)
    if same.is_file():
        return same
    alike = [p for p in files(other) if p.suffix == path.suffix and p.read_bytes() != path.read_bytes()]
    return max(alike, key=lambda p: p.parts[-2] == path.parts[-2])


def refused(directory: Path) -> str:
    """How a stage that reads the result in `directory` refuses it; fails when it would have begun to work."""

    def work(spec: Spec, inputs: Any) -> Any:
        raise AssertionError("the stage has begun to read a damaged input")

    stage, _, number = directory.name.partition("-")
    root = str(directory.parent.parent)
    reader = Spec("reader", 1, {}, inputs={stage: {"stage": stage, "id": number}}, root=root)
    with pytest.raises(InputError) as caught:
        process.execute(reader, work)
    return str(caught.value)


@pytest.mark.parametrize("kind", harness.DAMAGES)
def test_no_damage_to_a_stage_is_silent(two, kind):
    """Times and, where they can be, sizes stay as they were: only the bytes tell."""
    ours, theirs = two
    stages = [manifest.parent for manifest in sorted(ours.glob("store/*/manifest.json"))]
    tried = sum(each_file_damaged(directory, kind, theirs) for directory in stages)
    assert tried > (30 if kind == "swap" else 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(harness.DAMAGES.keys() - {"swap"}))
def test_no_damage_to_a_fine_tuning_is_silent(tiny_run, tmp_path, kind):
    """The stages that the run of letters does not have."""
    shutil.copytree(tiny_run.root / "store", tmp_path / "store", copy_function=shutil.copy2)
    for stage in ("tokenize_sft", "sft"):
        (directory,) = tmp_path.glob(f"store/{stage}-*")
        assert each_file_damaged(directory, kind) > 5


def each_file_damaged(directory: Path, kind: str, theirs: Path | None = None) -> int:
    """Damages each file of a stage in turn, and puts it back; returns how many, all of which have been told of."""
    assert store.verify(directory) == []
    tried = 0
    for path in files(directory):
        if path.name in UNREAD:
            continue
        other = counterpart(path, directory.parents[1], theirs) if kind == "swap" and theirs is not None else None
        if other is not None and other.read_bytes() == path.read_bytes():
            continue  # the same in both runs: no damage
        with harness.damaged(path, kind, other):
            named = store.verify(directory)
            assert named, path
            assert path.name in named[0], (path, named)
            if path.name != "spec.json":  # read by its own stage alone
                name = directory.name if (kind, path.name) == ("remove", "manifest.json") else path.name
                assert name in refused(directory), path
            else:
                with pytest.raises(InputError, match=r"spec\.json: "):
                    store.read_spec(directory)
        tried += 1
    assert store.verify(directory) == []
    return tried


@pytest.mark.parametrize("kind", harness.DAMAGES)
def test_no_damage_to_a_runs_notes_is_silent(two, kind):
    ours, theirs = two
    (run,) = ours.glob("runs/*")
    (other_run,) = theirs.glob("runs/*")
    found = [path for path in run.iterdir() if path.is_file() and not path.is_symlink() and path.name not in UNREAD]
    assert {"run.json", "report.json", "report.md", "report.html"} == {path.name for path in found}
    for path in found:
        with harness.damaged(path, kind, other_run / path.name):
            try:
                named = verification.verify_place(run)
            except InputError as error:  # without run.json it is no run
                named = [str(error)]
            # run.json of a run of the same name is whole; what it points at is not there
            assert named, path
            assert any(path.name in sentence or "no such" in sentence for sentence in named), named
    assert verification.verify_place(run) == []


def test_the_model_beside_the_checkpoints_is_read_only_as_it_was_written(two, tmp_path):
    """`sample` and `chat` take a model without its stage's manifest: the checkpoint vouches for the rest."""
    from jaxlm.stages import saved
    from jaxlm.tokenizers import char

    (directory,) = two[0].glob("store/pretrain-*")
    # To swap: other letters, but as many, and a longer context, which this model's parameters do not show.
    cfg = saved.read_config(directory)
    letters = "".join(chr(ord("a") + 1000 + i) for i in range(cfg.vocab_size))
    saved.write_description(tmp_path, cfg.replace(max_seq_len=2 * cfg.max_seq_len), char(letters))
    for name in ("model.json", "tokenizer.jaxlm.json"):
        for kind in harness.DAMAGES:
            with harness.damaged(directory / name, kind, tmp_path / name):
                try:
                    found = saved.load(directory)
                except InputError:
                    continue
                # A byte that carries nothing, such as a line end at the end: what is read is the same.
                assert kind == "truncate"
                read = (found.cfg, found.tokenizer.fingerprint)
            whole = saved.load(directory)
            assert read == (whole.cfg, whole.tokenizer.fingerprint)
