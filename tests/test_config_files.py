"""Configuration files and overrides: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxlm import recipes
from jaxlm.config import (
    DataConfig,
    EvalConfig,
    Frozen,
    ModelConfig,
    RopeScaling,
    RunConfig,
    SftConfig,
    TokenizerConfig,
    TrainConfig,
    load,
)  # fmt: skip
from jaxlm.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"


def loaded(tmp_path: Path, text: str | bytes, *overrides: str) -> RunConfig:
    file = tmp_path / "given.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file, overrides)


def test_values_of_a_file_and_overrides(tmp_path):
    cfg = loaded(
        tmp_path,
        "seed: 3\ntrain: {steps: 50, warmup_steps: 5}\nmodel: {preset: nano, n_layers: 2}\n",
        "train.steps=60", "train.learning_rate=1e-3", "model.n_kv_heads=null", "sft.template='{prompt}='",
        "model.scan_layers=true", "eval.top_p=.5", "tokenizer.kind=char",
    )  # fmt: skip
    assert (cfg.seed, cfg.train.steps, cfg.train.warmup_steps) == (3, 60, 5)
    assert cfg.train.learning_rate == 0.001  # YAML 1.1 reads 1e-3 as text
    assert cfg.model.n_kv_heads is None
    assert cfg.model.scan_layers is True
    assert cfg.model.n_layers == 2
    assert cfg.model.mlp == "relu2"  # from the preset
    assert cfg.sft.template == "{prompt}="
    assert (cfg.eval.top_p, cfg.tokenizer.kind) == (0.5, "char")


def test_the_run_is_named_after_the_file_unless_it_names_itself(tmp_path):
    assert loaded(tmp_path, "").name == "given"
    assert loaded(tmp_path, "name: mine").name == "mine"


def test_override_makes_missing_sections_and_a_later_one_wins(tmp_path):
    cfg = loaded(tmp_path, "", "sft.train.steps=5", "sft.train.steps=6", "model.rope_scaling.factor=2")
    assert cfg.sft.train.steps == 6
    assert cfg.model.rope_scaling == RopeScaling(factor=2.0)


def test_override_of_one_section_leaves_another_that_yaml_shares_with_it(tmp_path):
    cfg = loaded(tmp_path, "train: &t {steps: 50, beta1: 0.8}\nsft: {train: *t}\n", "sft.train.steps=5")
    assert (cfg.train.steps, cfg.sft.train.steps, cfg.sft.train.beta1) == (50, 5, 0.8)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "expected section.field=value"),
        ("=3", "expected section.field=value"),
        ("train.steps=[1, 2]", "train.steps"),
        ("train.steps=[1", "not readable as YAML"),
        ("train.stepz=3", "train.stepz: unknown option; did you mean steps?"),
        ("seed.x=3", "seed is not a section"),
        ("train.steps=ten", "found 'ten'"),
        ("train.learning_rate=nan", "train.learning_rate"),
        ("train=3", "train"),
        ("trane.steps=3", "did you mean train?"),
        ("train..steps=3", "train"),
    ],
)
def test_a_bad_override_is_refused_by_name(tmp_path, override, words):
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, "seed: 1", override)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"train: {steps: 3", "YAML"),
        (b"- a\n- b\n", "expected a mapping"),
        (b"just text", "expected a mapping"),
        (b"name: caf\xe9\n", "YAML"),  # Latin-1
        (b"seed: [1, 2]\n", "seed"),
        (b"train: {steps: 3, warmup_steps: 3}\n", "warmup_steps=3 must be below steps=3"),
        (b"!!python/object/apply:os.getcwd []\n", "YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, text)
    sentence = str(caught.value)
    assert "given.yaml" in sentence
    assert words in sentence
    assert "\n" not in sentence


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"absent\.yaml: no such configuration file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="no such configuration file"):
        load(tmp_path)  # a directory


def test_an_empty_section_means_the_defaults_or_is_refused_by_name(tmp_path):
    """`train:` with nothing under it is null in YAML."""
    with pytest.raises(InputError, match=r"given\.yaml: train: .*found None"):
        loaded(tmp_path, "train:\n")


def test_a_bare_name_finds_a_checked_in_config(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("seed: 5\n")
    monkeypatch.chdir(tmp_path)
    assert load("mine").seed == 5


RECIPES = {"verdict_gpt2"}  # not runs of the pipeline, but published evaluations


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_checked_in_config_loads(file):
    if file.stem in RECIPES:
        assert recipes.load(file).published
    else:
        assert load(file).name == file.stem


def test_there_are_checked_in_configs():
    assert "quickstart" in {file.stem for file in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize(
    "model", [RunConfig, ModelConfig, TrainConfig, DataConfig, TokenizerConfig, SftConfig, EvalConfig]
)
def test_every_option_says_what_it_means(model):
    silent = [
        name
        for name, field in model.model_fields.items()
        if not field.description and not isinstance(field.default, Frozen)
    ]
    assert silent == []
