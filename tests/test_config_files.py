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
    ("override", "section", "field", "text"),
    [  # what YAML 1.1 takes for numbers, dates and truths; 12:00:00 would be 43200 seconds
        ("name=2024", "", "name", "2024"),
        ("name=1e3", "", "name", "1e3"),
        ("name='7'", "", "name", "7"),
        ("pretrain.init_from=2024-01-02", "pretrain", "init_from", "2024-01-02"),
        ("publish.to=true", "publish", "to", "true"),
        ("publish.to=null", "publish", "to", None),
        ("launch.slurm.time_limit=12:00:00", "launch.slurm", "time_limit", "12:00:00"),
        ("launch.kubernetes.cpu=8", "launch.kubernetes", "cpu", "8"),
    ],
)
def test_a_field_of_text_takes_an_override_as_it_is_written(tmp_path, override, section, field, text):
    found = loaded(tmp_path, "", override)
    for part in filter(None, section.split(".")):
        found = getattr(found, part)
    assert getattr(found, field) == text


def test_in_a_file_such_a_text_needs_quotes_and_is_told_so(tmp_path):
    with pytest.raises(InputError, match=r"given\.yaml: name: expected a text, found 2024; put quotes around it\."):
        loaded(tmp_path, "name: 2024")
    assert loaded(tmp_path, "name: '2024'").name == "2024"


def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path):
    words = r"given\.yaml: line 4: steps stands in this mapping already, at line 2; keep one\."
    with pytest.raises(InputError, match=words):
        loaded(tmp_path, "train:\n  steps: 5\n  beta1: 0.8\n  'steps': 6\n")
    with pytest.raises(InputError, match=r"given\.yaml: line 2: seed stands"):
        loaded(tmp_path, "seed: 1\nseed: 1\n")
    with pytest.raises(InputError, match=r"^--set train=\{steps: 1, steps: 2\}: line 1: steps stands"):
        loaded(tmp_path, "", "train={steps: 1, steps: 2}")
    # A merge key fills in what is not there; what it brings along is not written twice.
    cfg = loaded(tmp_path, "train: &t {steps: 50, beta1: 0.8}\nsft: {train: {<<: *t, steps: 7}}\n")
    assert (cfg.sft.train.steps, cfg.sft.train.beta1) == (7, 0.8)


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "{}"])
def test_an_empty_file_is_a_run_of_the_defaults(tmp_path, text):
    assert loaded(tmp_path, text) == RunConfig(name="given")


def test_the_vocabulary_of_a_run_is_its_tokenizers(tmp_path):
    for text, overrides in (("model: {vocab_size: 99}", []), ("", ["model.vocab_size=99"])):
        with pytest.raises(InputError, match=r"model\.vocab_size: a run has the vocabulary of its tokenizer"):
            loaded(tmp_path, text, *overrides)
    assert loaded(tmp_path, "model: {preset: gpt2}").model.vocab_size == 50257  # the shape's own says nothing wrong


def test_a_tokenizer_that_is_on_disk_is_found_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"tokenizer\.name: expected gpt2, cl100k_base, or a directory"):
        loaded(tmp_path, "", "tokenizer.kind=named", f"tokenizer.name={tmp_path}/empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    assert loaded(tmp_path, "", "tokenizer.kind=named", f"tokenizer.name={tmp_path}/empty").tokenizer.kind == "named"


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
        ("train=3", "train: expected options, as name: value, found 3"),
        ("gate.bounds=val_loss<=1", "gate.bounds: expected a list, such as [a, b]"),
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
        (b"- a\n- b\n", "expected a mapping at the top, found a list; write lines such as"),
        (b"just text", "expected a mapping at the top, found a text"),
        (b"12", "expected a mapping at the top, found 12"),
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
    with pytest.raises(InputError, match=r"^mien: no such configuration file; did you mean mine\?$"):
        load("mien")
    with pytest.raises(InputError, match=r"^qickstart: .* did you mean quickstart\?$"):
        load("qickstart")


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
