"""Configuration: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pydantic
import pytest

from jaxlm.config import (
    DataConfig,
    EvalConfig,
    Frozen,
    ModelConfig,
    PretrainConfig,
    RopeScaling,
    RunConfig,
    SftConfig,
    TokenizerConfig,
    TrainConfig,
    TrainOptions,
    load,
    validated,
)  # fmt: skip
from jaxlm.errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"
HEX = "0" * 64


def refused(values: dict[str, Any], model: type[Frozen] = RunConfig) -> str:
    """The sentence with which `values` are refused."""
    with pytest.raises(InputError) as caught:
        validated(model, values)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not sentence.endswith("..")
    assert not sentence.endswith("?.")
    return sentence


def loaded(tmp_path: Path, text: str | bytes, *overrides: str) -> RunConfig:
    file = tmp_path / "given.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file, overrides)


# Unknown names


@pytest.mark.parametrize(
    ("values", "place", "nearest"),
    [
        ({"sead": 1}, "sead", "seed"),
        ({"train": {"step": 3}}, "train.step", "steps"),
        ({"train": {"learning_rat": 3}}, "train.learning_rat", "learning_rate"),
        ({"model": {"n_layer": 3}}, "model.n_layer", "n_layers"),
        ({"model": {"presets": "nano"}}, "model.presets", "preset"),
        ({"model": {"rope_scaling": {"factr": 3}}}, "model.rope_scaling.factr", "factor"),
        ({"sft": {"train": {"warmup": 3}}}, "sft.train.warmup", "warmup_steps"),
        ({"data": {"seqlen": 3}}, "data.seqlen", "seq_len"),
        ({"tokenizer": {"typ": "char"}}, "tokenizer.typ", None),
        ({"eval": {"tempreature": 1}}, "eval.tempreature", "temperature"),
        ({"pretrain": {"init_form": "x"}}, "pretrain.init_form", "init_from"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(values, place, nearest):
    sentence = refused(values)
    assert sentence.startswith(f"{place}: unknown option; ")
    if nearest:
        assert f"did you mean {nearest}?" in sentence
    else:  # nothing is near: then all names are given
        assert "known names: kind, name, unk, vocab_size" in sentence


def test_unknown_name_beside_a_preset():
    sentence = refused({"model": {"preset": "gpt2", "n_layer": 3}})
    assert "n_layer: unknown option; did you mean n_layers?" in sentence
    assert "model" in sentence


def test_unknown_preset_names_the_nearest():
    assert refused({"model": {"preset": "gpt-2"}}) == "model.preset: unknown preset 'gpt-2'; did you mean gpt2?"


def test_a_key_that_is_not_text_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"given\.yaml: .*7"):
        loaded(tmp_path, "7: 8\n")
    with pytest.raises(InputError, match=r"given\.yaml: .*train.*True"):
        loaded(tmp_path, "train: {yes: 8}\n")


# Values


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),  # the state holds it as uint32
        ({"train": {"steps": 0}}, "train.steps"),
        ({"train": {"steps": 1.5}}, "train.steps"),
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"train": {"steps": None}}, "train.steps"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate"),
        ({"train": {"learning_rate": math.nan}}, "train.learning_rate"),
        ({"train": {"learning_rate": math.inf}}, "train.learning_rate"),
        ({"train": {"checkpoint_seconds": math.inf}}, "train.checkpoint_seconds"),
        ({"train": {"checkpoint_every": -1}}, "train.checkpoint_every"),
        ({"train": {"log_every": 0}}, "train.log_every"),
        ({"seed": True}, "seed"),  # YAML's `yes`, too
        ({"train": {"learning_rate": True}}, "train.learning_rate"),
        ({"sft": {"seq_len": True}}, "sft.seq_len"),  # of those that may be empty, too
        ({"model": {"n_kv_heads": True}}, "model.n_kv_heads"),
        ({"model": {"head_dim": True}}, "model.head_dim"),
        ({"model": {"d_ff": True}}, "model.d_ff"),
        ({"model": {"logit_softcap": True}}, "model.logit_softcap"),
        ({"data": {"size": True}}, "data.size"),
        ({"train": {"beta2": 1.0}}, "train.beta2"),
        ({"train": {"final_lr_ratio": 1.1}}, "train.final_lr_ratio"),
        ({"train": {"optimizer": "sgd"}}, "train.optimizer"),
        ({"sft": {"train": {"batch_size": 0}}}, "sft.train.batch_size"),
        ({"model": {"n_layers": 0}}, "model.n_layers"),
        ({"model": {"dropout": 1.0}}, "model.dropout"),
        ({"model": {"norm_eps": math.nan}}, "model.norm_eps"),
        ({"model": {"compute_dtype": "float16"}}, "model.compute_dtype"),
        ({"model": {"embed_mix": 17}}, "model.embed_mix"),
        ({"model": {"rope_scaling": {"factor": 0.5}}}, "model.rope_scaling.factor"),
        ({"data": {"val_fraction": 1.0}}, "data.val_fraction"),
        ({"data": {"seq_len": 0}}, "data.seq_len"),
        ({"data": {"sha256": "xyz"}}, "data.sha256"),
        ({"data": {"source": "shakespear"}}, "data.source"),
        ({"data": {"source": "instructions"}}, "data.source"),  # a public file, and no text
        ({"sft": {"source": "instruction"}}, "sft.source"),
        ({"sft": {"source": "verdict"}}, "sft.source"),  # no prompts with responses
        ({"tokenizer": {"kind": "named", "name": "gpt-2"}}, "tokenizer.name"),
        ({"eval": {"top_p": -0.1}}, "eval.top_p"),
        ({"eval": {"batch_size": 0}}, "eval.batch_size"),
        ({"name": "../up"}, "name"),
        ({"name": ""}, "name"),
        ({"launcher": "thread"}, "launcher"),
        ({"train": 3}, "train"),
        ({"train": [1]}, "train"),
    ],
)
def test_value_out_of_range_is_refused_with_its_field(values, field):
    sentence = refused(values)
    assert sentence.startswith(f"{field}: ")
    value = values
    for part in field.split("."):
        value = value[part]
    assert f"found {value!r}" in sentence


def test_a_long_value_is_not_repeated_whole():
    sentence = refused({"name": "/" * 100_000})
    assert "found '////" in sentence
    assert sentence.endswith("... (100,002 characters).")
    assert len(sentence) < 400


def test_several_problems_are_named_at_once():
    sentence = refused({"train": {"steps": 0, "beta1": 2.0}, "sead": 3})
    assert all(part in sentence for part in ("train.steps", "train.beta1", "sead"))


@pytest.mark.parametrize(
    ("model", "values", "words"),
    [
        (ModelConfig, {"d_model": 30, "n_heads": 4}, ["n_heads=4", "d_model=30"]),
        (ModelConfig, {"d_model": 32, "n_heads": 4, "n_kv_heads": 3}, ["n_kv_heads=3", "n_heads=4"]),
        (ModelConfig, {"d_model": 12, "n_heads": 4}, ["even head_dim", "3"]),
        (ModelConfig, {"d_model": 9, "n_heads": 3, "position": "sinusoidal"}, ["even d_model", "9"]),
        (ModelConfig, {"norm": "rms", "norm_bias": True}, ["norm_bias"]),
        (ModelConfig, {"zero_init_head": True, "tie_embeddings": True}, ["zero_init_head", "tie_embeddings"]),
        (ModelConfig, {"tie_qk_init": True, "n_heads": 4, "n_kv_heads": 2}, ["tie_qk_init", "n_kv_heads=2"]),
        (ModelConfig, {"position": "learned", "rope_scaling": {}}, ["rope_scaling", "rotary"]),
        (RopeScaling, {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, ["high_freq_factor", "low_freq_factor"]),
        (TrainOptions, {"steps": 10, "warmup_steps": 10}, ["warmup_steps=10", "steps=10"]),
        (TrainOptions, {"batch_size": 6, "grad_accum_steps": 4}, ["grad_accum_steps=4", "batch_size=6"]),
        (DataConfig, {"source": "file"}, ["path", "url"]),
        (DataConfig, {"source": "file", "path": "a", "url": "b", "size": 1, "sha256": HEX}, ["path", "url"]),
        (DataConfig, {"source": "storyworld", "path": "a"}, ["path", "storyworld"]),
        (DataConfig, {"source": "file", "url": "http://x/y"}, ["size", "sha256"]),
        (DataConfig, {"size": 3}, ["size=3", "url"]),
        (DataConfig, {"source": "file", "path": "a", "size": 3}, ["size=3", "url"]),
        (DataConfig, {"sha256": HEX}, ["sha256", "source=storyworld"]),
        (DataConfig, {"val_fraction": 0.2}, ["val_fraction=0.2", "n_val_stories"]),
        (TokenizerConfig, {"kind": "named"}, ["name=gpt2"]),
        (TokenizerConfig, {"kind": "char", "name": "gpt2"}, ["name=gpt2", "kind=named", "kind=char"]),
        (TokenizerConfig, {"vocab_size": 99}, ["vocab_size=99", "kind=bpe", "kind=word"]),
        (PretrainConfig, {"init_optimizer": True}, ["init_optimizer", "init_from"]),
        (SftConfig, {"source": "file"}, ["path"]),
        (SftConfig, {"path": "a"}, ["path"]),
        (SftConfig, {"template": "Question: "}, ["{prompt}"]),
        (RunConfig, {"data": {"seq_len": 65}, "model": {"max_seq_len": 64}}, ["data.seq_len=65", "max_seq_len=64"]),
        (RunConfig, {"data": {"source": "shakespeare"}}, ["sft.source", "sft.enabled=false"]),
        # 256 bytes, and the token that ends a text
        (RunConfig, {"tokenizer": {"kind": "bpe", "vocab_size": 256}}, ["tokenizer.vocab_size=256", "least 257"]),
        (RunConfig, {"launcher": "inline", "launch": {"kind": "slurm"}}, ["launch.kind=slurm", "launcher=inline"]),
        (RunConfig, {"launcher": "inline", "launch": {"processes": 2}}, ["launch.processes=2", "launcher=inline"]),
        (RunConfig, {"launcher": "inline", "launch": {"timeout_hours": 2}}, ["launch.timeout_hours=2.0"]),
    ],
)
def test_fields_that_do_not_fit_together(model, values, words):
    sentence = refused(values, model)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("model", "values"),
    [  # each a step inside one of the borders above
        (ModelConfig, {"d_model": 30, "n_heads": 4, "head_dim": 8}),
        (ModelConfig, {"d_model": 32, "n_heads": 4, "n_kv_heads": 1}),
        (ModelConfig, {"kind": "bigram", "d_model": 7}),
        (TrainOptions, {"steps": 10, "warmup_steps": 9}),
        (TrainOptions, {"batch_size": 8, "grad_accum_steps": 4}),
        (DataConfig, {"source": "file", "url": "http://x/y", "size": 1, "sha256": HEX}),
        (RunConfig, {"data": {"seq_len": 64}, "model": {"max_seq_len": 64}}),
        (RunConfig, {"data": {"source": "shakespeare", "val_fraction": 0.2}, "sft": {"enabled": False}}),
        (RunConfig, {"sft": {"source": "instructions"}}),
        (RunConfig, {"tokenizer": {"kind": "bpe", "vocab_size": 257}}),
        (RunConfig, {"tokenizer": {"kind": "bpe", "vocab_size": 256}, "sft": {"enabled": False}}),
        (RunConfig, {"pretrain": {"init_from": "first", "init_optimizer": True}}),
        (DataConfig, {"source": "file", "path": "a", "sha256": HEX}),
        (RunConfig, {"data": {"seq_len": 4096}, "model": {"kind": "bigram"}}),
        (RunConfig, {"seed": 2**32 - 1}),
    ],
)
def test_what_just_fits_is_accepted(model, values):
    validated(model, values)


# Objects


@pytest.mark.parametrize("model", [ModelConfig, TrainConfig, RunConfig, DataConfig, EvalConfig])
def test_configurations_are_frozen_and_hashable(model):
    cfg = model()
    field = next(iter(model.model_fields))
    with pytest.raises(pydantic.ValidationError):
        setattr(cfg, field, getattr(cfg, field))
    assert hash(cfg) == hash(model())
    assert cfg == model()


def test_equal_configurations_are_one_key_and_different_ones_two():
    one, other = ModelConfig(n_layers=2), ModelConfig(n_layers=3)
    assert {one: 1, other: 2}[ModelConfig(n_layers=2)] == 1


def test_replace_validates_again_and_leaves_the_original():
    cfg = ModelConfig(d_model=64, n_heads=4)
    assert cfg.replace(n_heads=8).n_heads == 8
    assert cfg.n_heads == 4
    with pytest.raises(InputError, match="n_heads=5 must divide d_model=64"):
        cfg.replace(n_heads=5)
    with pytest.raises(InputError, match="did you mean n_heads"):
        cfg.replace(n_head=8)
    nested = TrainConfig(model=cfg).replace(steps=7)
    assert nested.model == cfg


def test_derived_shapes():
    cfg = ModelConfig(d_model=64, n_heads=4)
    assert (cfg.kv_heads, cfg.d_head, cfg.ff) == (4, 16, 256)  # K = H, h = D / H, F = 4 D
    cfg = cfg.replace(n_kv_heads=2, head_dim=24, d_ff=96)
    assert (cfg.kv_heads, cfg.d_head, cfg.ff) == (2, 24, 96)


def test_identity_leaves_out_what_decides_nothing():
    plain = RunConfig()
    cosmetic = RunConfig(
        name="other", root="/elsewhere", launcher="inline",
        train=TrainOptions(eval_every=7, eval_rows=3, checkpoint_every=5, checkpoint_seconds=1.0, keep_checkpoints=9,
                           log_every=1, sample_tokens=0),
        sft=SftConfig(train=TrainOptions(log_every=3)),
        eval=EvalConfig(batch_size=3),
    )  # fmt: skip
    assert cosmetic.identity() == plain.identity()
    assert "name" not in plain.identity()
    assert "log_every" not in plain.identity()["sft"]["train"]
    for changed in (
        RunConfig(seed=1),
        RunConfig(train=TrainOptions(steps=999)),
        RunConfig(model=ModelConfig(norm_eps=1e-6)),
        RunConfig(sft=SftConfig(train=TrainOptions(beta1=0.8))),
        RunConfig(eval=EvalConfig(temperature=0.7)),
    ):
        assert changed.identity() != plain.identity()


def test_identity_is_plain_json():
    import json

    cfg = RunConfig(model=ModelConfig(rope_scaling=RopeScaling()))
    assert json.loads(json.dumps(cfg.identity())) == cfg.identity()
    assert cfg.identity()["model"]["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {preset: nano, name: x}", "unknown option 'name'|name"),
        ("model: {preset: nano, 5: 3}", "5"),
        ("a: " + "[" * 3000, "not a readable YAML file"),
    ],
)
def test_what_no_configuration_says_is_one_sentence(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "x.yaml")


def test_fine_tuning_that_is_off_is_not_checked(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {seq_len: 16}\nmodel: {max_seq_len: 32}\nsft: {seq_len: 232}")
    with pytest.raises(InputError, match=r"sft\.seq_len=232 is above"):
        load(tmp_path / "x.yaml")
    assert load(tmp_path / "x.yaml", ["sft.enabled=false"]).model.max_seq_len == 32
