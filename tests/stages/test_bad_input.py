"""Bad input to the stages: one sentence that names the file or field, and nothing lost."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxlm.checkpoint import dir_lock
from jaxlm.errors import DivergedError, InputError
from jaxlm.stages import saved
from jaxlm.stages.plan import plan
from jaxlm.stages.runner import run_chain, run_stage
from jaxlm.stages.store import check, write_spec

QUICK_COMPILE = True


def quiet(line: str) -> None:
    pass


def base_dir(run):
    return run.manifests["pretrain"].directory


def sentence(cfg, last="pretrain") -> str:
    with pytest.raises(InputError) as caught:
        run_chain(cfg, last=last, echo=quiet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"  \n\n ", "empty"),
        ("caf\u00e9 au lait".encode("latin-1"), "byte 3 (0xe9) is not UTF-8"),
        (b"abc\0def", "byte 3 is NUL"),
    ],
)
def test_bad_text_is_refused_by_name(letters, tmp_path, content, words):
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    found = sentence(letters(f"data.path={file}"))
    assert str(file) in found
    assert words in found


def test_a_text_that_is_not_the_one_meant_is_refused(letters):
    found = sentence(letters(f"data.sha256={'a' * 64}"))
    assert "letters.txt" in found
    assert "data.sha256 says aaaaaaaaaaaa" in found


def test_a_corpus_shorter_than_one_window_is_refused(letters, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("abcdefghijkl" * 2)
    found = sentence(letters(f"data.path={file}", "data.seq_len=30"))
    assert "31 needed for one window of data.seq_len=30" in found
    assert "found 21 tokens" in found  # nine tenths of 24


def test_a_character_that_the_tokenizer_has_never_seen_is_refused(letters, tmp_path):
    file = tmp_path / "new.txt"
    file.write_text("abc " * 25 + "\n" + "abc " * 25 + "\nxyz!" * 4)  # of 221 characters, 198 are for training
    found = sentence(letters(f"data.path={file}"))
    # Line 3, and in what was kept for validation: "c \nxyz!…", or so
    assert found.startswith(f"tokenizer.unk=false: data.path={file}, line 3 of the text (val split): character 'x' (U+")
    file = tmp_path / "new.jsonl"
    texts = ["abc\nabc"] * 8 + ["cab", "a\nbx"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = sentence(letters(f"data.path={file}"))
    assert f"data.path={file}, document 10, line 2 of it (val split): character 'x' (U+0078) at offset 3" in found


def test_an_example_that_the_tokenizer_has_never_seen_is_refused_before_any_training(letters, tmp_path):
    file = tmp_path / "pairs.jsonl"
    for at, words in (
        (1, "train split: example 2 ('the Qat'): character 'Q'"),
        (11, "test split: character 'Q'"),  # what the evaluation would ask
    ):
        pairs = [{"prompt": "the Qat" if number == at else "the cat", "response": " sat"} for number in range(12)]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        settings = ("sft.enabled=true", "sft.source=file", f"sft.path={file}")
        assert sentence(letters(*settings), last="tokenize_sft").startswith(f"sft.path={file}, {words}")


def test_a_validation_split_of_nothing_says_what_to_change(letters, tmp_path):
    file = tmp_path / "end.txt"
    file.write_text("the cat sat on the mat\n" * 20)
    found = sentence(letters(f"data.path={file}", "data.val_fraction=0.001"), last="download")
    assert found.startswith("data.val_fraction=0.001 leaves a split empty: of 460 characters, validation got nothing")
    assert found.endswith("but white space; raise it, or give more text.")


def test_a_missing_start_is_refused(letters, tmp_path):
    assert "no such run, stage or directory" in sentence(letters(f"pretrain.init_from={tmp_path}/absent"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in sentence(letters(f"pretrain.init_from={tmp_path}/empty"))


def test_a_start_of_another_tokenizer_is_refused(letters, tiny_run):
    found = sentence(letters(f"pretrain.init_from={base_dir(tiny_run)}"))
    assert f"init_from={base_dir(tiny_run)}: that model's tokenizer is not" in found


def test_checkpoints_of_another_configuration_are_refused(letters, letters_run):
    cfg = letters("train.learning_rate=0.2")
    spec = next(spec for spec in plan(cfg) if spec.stage == "pretrain")
    write_spec(spec)
    theirs = base_dir(letters_run)
    shutil.copytree(theirs / "checkpoints", spec.directory / "checkpoints")
    found = sentence(cfg)
    assert "checkpoints/12" in found
    assert f"spec is '{theirs.name.partition('-')[2]}'" in found
    assert f"'{spec.id}' is expected" in found
    assert sorted(p.name for p in (spec.directory / "checkpoints").iterdir() if p.name.isdecimal()) == ["12", "8"]


def test_a_directory_in_use_is_refused(letters):
    spec = next(spec for spec in plan(letters("train.learning_rate=0.2")) if spec.stage == "pretrain")
    write_spec(spec)
    with dir_lock(spec.directory), pytest.raises(InputError, match=f"{spec.name} is in use by process") as caught:
        run_stage(spec, launcher="inline", echo=quiet)
    assert "\n" not in str(caught.value)


def test_a_training_that_diverges_names_the_step_and_the_last_good_checkpoint(letters):
    """A rate of 1e37: the fourth loss overflows."""
    cfg = letters("train.learning_rate=1e37", "train.checkpoint_every=1", "train.schedule=constant")
    with pytest.raises(DivergedError) as caught:
        run_chain(cfg, last="pretrain", echo=quiet)
    spec = next(spec for spec in plan(cfg) if spec.stage == "pretrain")
    assert "before the update of step 4: loss inf" in str(caught.value)
    assert f"the last good checkpoint is step 3 in {spec.directory / 'checkpoints'}" in str(caught.value)
    assert saved.load(spec.directory).step == 3
    assert check(spec)[0] is None
