"""`jaxlm import-hf`, and `jaxlm verify` of what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import init, interop, tokenizers
from jaxlm.cli import main
from jaxlm.config import ModelConfig
from jaxlm.interop import gguf, save_hf


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a directory of safetensors."""
    tokenizer = tokenizers.char("abc", eot=True)
    cfg = ModelConfig(vocab_size=tokenizer.vocab_size, n_layers=1, d_model=8, n_heads=2, max_seq_len=16)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)
    return save_hf(tmp_path_factory.mktemp("models") / "tiny", cfg, params, tokenizer)


@pytest.fixture
def jaxlm(capsys: pytest.CaptureFixture[str]) -> Any:
    """jaxlm("verify", ...) -> exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert captured.err.count("\n") <= 1
        return ended.value.code, captured.out, captured.err

    return run


def test_an_imported_model_is_verified(jaxlm: Any, published: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert jaxlm("import-hf", published, made)[0] == 0
    assert jaxlm("verify", made) == (0, f"{made}: an imported model, every file as it was written\n", "")
    arrays = [file for file in (made / "checkpoints" / "0" / "params").rglob("*") if file.is_file()]
    victims = [made / "model.json", made / "tokenizer.jaxlm.json", max(arrays, key=lambda file: file.stat().st_size)]
    for victim in victims:
        whole = victim.read_bytes()
        victim.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        code, out, err = jaxlm("verify", made)
        assert (code, out) == (65, "")
        assert str(victim) in err
        victim.unlink()
        assert f"{victim}: " in (err := jaxlm("verify", made)[2])
        assert "missing" in err
        victim.write_bytes(whole)
    assert jaxlm("verify", made)[0] == 0


def test_what_can_be_verified_is_said(jaxlm: Any, published: Path) -> None:
    code, _, err = jaxlm("verify", published)
    assert code == 65
    assert "neither a run nor a stage" in err
    assert "jaxlm import-hf" in err


def test_the_target_is_looked_at_before_the_model(jaxlm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was read first")

    monkeypatch.setattr(gguf, "load_gguf", load)
    monkeypatch.setattr(interop, "load_hf", load)
    monkeypatch.setattr("jaxlm.loading.load_model", load)
    (tmp_path / "file").write_text("x")
    for command, source in (("import-hf", "x.gguf"), ("import-hf", "owner/name"), ("export-hf", "run")):
        code, _, err = jaxlm(command, source, tmp_path / "file" / "sub" / "deep")
        assert code == 65
        assert f"{tmp_path}/file is a file, so nothing can be made below it" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("quickstart", "is a configuration to train with (jaxlm pipeline quickstart)"),
        ("nano", "is a preset, a shape without weights (jaxlm inspect nano)"),
        ("llama-3.2-1b", "is a preset, a shape without weights (jaxlm inspect llama-3.2-1b)"),
        ("mine", "is a run, which needs no import (jaxlm sample mine)"),
    ],
)
def test_names_of_ours_are_not_asked_of_the_hub(
    jaxlm: Any, source: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    code, _, err = jaxlm("import-hf", source, "new")
    assert (code, err.count(what)) == (65, 1)
    assert "give a Hugging Face directory, owner/name or a .gguf file." in err


def test_gpt2_is_a_repository_too(jaxlm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(interop, "load_hf", lambda name, **_: asked.append(name) or (None, None, None))
    assert "has no tokenizer.json" in jaxlm("import-hf", "gpt2", tmp_path / "new")[2]
    assert asked == ["gpt2"]
