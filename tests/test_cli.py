"""The `jaxlm` command: what it prints, and the exit codes that retries depend on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxlm._sealed import write_sealed
from jaxlm.cli import app, main

QUICK_COMPILE = True

COMMANDS = [
    "pipeline",
    "prepare",
    "pretrain",
    "sft",
    "evaluate",
    "sample",
    "chat",
    "inspect",
    "import-hf",
    "export-hf",
    "bench",
    "recipe",
    "verify",
    "doctor",
    "flow",
    "serve-flows",
    "diff",
    "playground",
]


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def jaxlm(capsys):
    """jaxlm("sample", "run", ...) -> how the command ended."""

    def run(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(code, captured.out, captured.err)

    return run


def one_sentence(ended: Ended, code: int = 65) -> str:
    """The error of a command: its exit code, one line on standard error, nothing on standard output."""
    assert ended.code == code, ended
    assert ended.out == ""
    assert ended.err.startswith("jaxlm: ")
    assert ended.err.count("\n") == 1
    assert ended.err.endswith("\n")
    assert "Traceback" not in ended.err
    return ended.err.strip()


# Help


def test_there_are_no_other_commands():
    assert {name for name in app if not name.startswith("-")} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(jaxlm, command):
    ended = jaxlm(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"jaxlm {command}" in ended.out
    found = app[command]
    text = found.default_command.__doc__ if found.default_command else found.help
    first = (text or "").strip().splitlines()[0]
    assert first[:30] in " ".join(ended.out.split())


@pytest.mark.parametrize("command", ["playground", "verify", "diff"])
def test_help_tells_how_a_stage_is_named(jaxlm, command):
    """Help is read as markup, which leaves out words between < and >."""
    assert "RUN/STAGE" in jaxlm(command, "--help").out


def test_overview_and_version(jaxlm):
    ended = jaxlm("--help")
    assert ended.code == 0
    assert all(command in ended.out for command in COMMANDS)
    ended = jaxlm("--version")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", ended.out)


# Wrong words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretran", "x.yaml"], "pretran"),
        (["pretrain"], "CONFIG"),
        (["pretrain", "x.yaml", "--stes", "3"], "--stes"),
        (["pretrain", "x.yaml", "y.yaml"], "y.yaml"),
        (["sample", "run", "--top-k", "many"], "--top-k"),
        (["sample", "run", "--temperature"], "--temperature"),
    ],
)
def test_wrong_words_are_one_sentence_and_65(jaxlm, arguments, words):
    sentence = one_sentence(jaxlm(*arguments))
    assert words.lower() in sentence.lower()
    assert "jaxlm --help" in sentence


@pytest.mark.parametrize("command", ["prepare", "pretrain", "sft", "evaluate"])
def test_a_missing_configuration_is_named(jaxlm, command, tmp_path):
    assert f"{tmp_path}/absent.yaml: no such configuration file" in one_sentence(
        jaxlm(command, tmp_path / "absent.yaml")
    )


def test_an_unknown_option_of_the_configuration_without_a_traceback(tmp_path):
    """As a process, so that all of standard error is seen."""
    (tmp_path / "mine.yaml").write_text("train: {steps: 3}\n")
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm.cli", "pretrain", "mine.yaml", "--set", "train.step=4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    sentence = one_sentence(Ended(done.returncode, done.stdout, done.stderr))
    assert sentence == "jaxlm: mine.yaml: train.step: unknown option; did you mean steps?"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_values_that_do_not_fit(jaxlm, letters_run, tmp_path):
    root = ("--root", tmp_path)
    sentence = one_sentence(jaxlm("pretrain", letters_run.config, *root, "--set", "train.warmup_steps=12"))
    assert "warmup_steps=12 must be below steps=12" in sentence
    sentence = one_sentence(jaxlm("prepare", letters_run.config, *root, "--set", f"data.path={tmp_path}/none.txt"))
    assert f"data.path={tmp_path}/none.txt: no such file" in sentence
    sentence = one_sentence(jaxlm("sft", letters_run.config, *root))
    assert "stage sft" in sentence
    assert "sft.enabled=true" in sentence


# A run that is done


@pytest.mark.parametrize(
    ("command", "stages"),
    [
        ("prepare", ["download", "tokenize", "tokenize_sft"]),
        ("pretrain", ["download", "tokenize", "pretrain"]),
        ("sft", ["download", "tokenize", "tokenize_sft", "pretrain", "sft"]),
        ("evaluate", ["download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate"]),
    ],
)
def test_a_stage_and_what_it_needs_are_found_done(jaxlm, tiny_run, command, stages):
    ended = jaxlm(command, tiny_run.config, "--root", tiny_run.root)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines] == stages
    assert all("already done" in line for line in lines)


def test_an_unknown_run_names_the_nearest(jaxlm, tiny_run):
    for command in ("sample", "verify"):
        sentence = one_sentence(jaxlm(command, "tinny", "--root", tiny_run.root))
        assert "tinny: no such run, stage or directory; did you mean tiny" in sentence


def test_sample_continues_a_prompt(jaxlm, letters_run):
    def texts(*options: object) -> list[str]:
        ended = jaxlm(
            "sample", "letters", "--root", letters_run.root, "--prompt", "the ", "--max-new-tokens", 5, *options
        )
        assert (ended.code, ended.err) == (0, "")
        return ended.out.splitlines()

    (text,) = texts()
    assert re.fullmatch(r"the [a-z;. ]{5}", text)
    assert texts() == [text]  # the same seed
    assert len(texts("--n", 3, "--seed", 1)) == 3
    assert texts("--temperature", 0) == texts("--temperature", 0, "--seed", 7)


def test_sample_takes_a_stage_or_a_checkpoint_too(jaxlm, letters_run):
    stage = letters_run.manifests["pretrain"].directory
    same = [
        jaxlm("sample", path, "--prompt", "the ", "--max-new-tokens", 5, "--temperature", 0)
        for path in (stage, stage / "checkpoints" / "12")
    ]
    assert same[0] == same[1]
    assert same[0].code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", ""], "--prompt"),
        (["--prompt", "QUEUE"], "'Q' (U+0051)"),  # not in the text
        (["--prompt", "the ", "--n", 0], "--n 0"),
        (["--prompt", "the ", "--temperature", -1], "temperature"),
        (["--prompt", "the ", "--top-p", 1.5], "top_p"),
        (["--prompt", "the ", "--max-new-tokens", 0], "max_new_tokens"),
        (["--prompt", "the cat sat on the mat; " * 3], "32"),  # longer than the model's positions
    ],
)
def test_sample_refuses_what_it_cannot_do(jaxlm, letters_run, options, words):
    assert words in one_sentence(jaxlm("sample", "letters", "--root", letters_run.root, *options))


def test_sample_before_there_is_a_model(jaxlm, letters_run, tmp_path):
    root = shutil.copytree(letters_run.root, tmp_path / "root", symlinks=True)
    file = root / "runs" / "letters" / "run.json"
    values = json.loads(file.read_text())
    del values["stages"]["pretrain"]
    write_sealed(file, {key: item for key, item in values.items() if key not in ("sealed", "sha256")})
    sentence = one_sentence(jaxlm("sample", "letters", "--root", root))
    assert "the run has no sft or pretrain stage yet" in sentence


def test_verify_names_what_is_damaged(jaxlm, letters_run, tmp_path):
    root = shutil.copytree(letters_run.root, tmp_path / "root", symlinks=True)
    ended = jaxlm("verify", "letters", "--root", root)
    assert (ended.code, ended.err) == (0, "")
    assert "4 stages, every file as it was written" in ended.out

    stage = root / "store" / letters_run.manifests["pretrain"].directory.name
    arrays = (stage / "checkpoints" / "12" / "params").rglob("*")
    victim = max((file for file in arrays if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    sentence = one_sentence(jaxlm("verify", "letters", "--root", root))
    assert str(victim) in sentence
    assert sentence.count("SHA-256") == 1  # the others are whole
    # Weights that are damaged are not sampled from: the checkpoint before them is, and says so.
    ended = jaxlm("sample", "letters", "--root", root, "--prompt", "the ", "--max-new-tokens", 5)
    assert ended.code == 0
    assert ended.out.startswith("the ")
    assert "damaged checkpoint passed over" in ended.err
    assert victim.name in ended.err


def test_doctor_tells_what_a_bug_report_needs(jaxlm):
    ended = jaxlm("doctor")
    assert ended.code == 0
    facts = json.loads(ended.out)
    assert {"python", "libraries", "devices", "cpu cores", "download cache", "compiled programs"} <= facts.keys()
    assert facts["prefect"].count(".") >= 2
    assert facts["libraries"]["jax"]


@pytest.mark.parametrize("kept", [None, "", "/some/folder"])
def test_doctor_tells_who_keeps_compiled_programs(jaxlm, monkeypatch, kept):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if kept is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", kept)
    told = json.loads(jaxlm("doctor").out)["compiled programs"]
    assert told == kept if kept else told.startswith("kept by the playground alone, in /")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("sample {run} --prompt A --seed -1", "--seed"),
        ("sample {run} --prompt A --seed 99999999999999999999", "--seed"),
        ("sample {run}/nosuch --prompt A", "nosuch"),
        ("export-hf {run} /proc/zz", "/proc/zz|/proc"),
    ],
)
def test_what_has_no_better_words_is_one_sentence_too(tiny_run, capsys, words, named):
    with pytest.raises(SystemExit) as ended:
        main([*words.format(run="tiny").split(), "--root", str(tiny_run.root)])
    err = capsys.readouterr().err
    assert ended.value.code == 65, err
    assert "Traceback" not in err
    assert re.search(named, err), err
