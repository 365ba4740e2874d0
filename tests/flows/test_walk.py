"""What is done again after a change: each field of the configuration, each input byte, each stage's version."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from jaxlm.config import Frozen, RunConfig, load
from jaxlm.errors import InputError
from jaxlm.stages.plan import VERSIONS, plan
from jaxlm.stages.runner import run_chain

ALL = ("download", "tokenize", "tokenize_sft", "pretrain", "sft", "evaluate")
AFTER = {
    "download": ALL,
    "tokenize": ALL[1:],
    "tokenize_sft": ("tokenize_sft", "sft", "evaluate"),
    "pretrain": ("pretrain", "sft", "evaluate"),
    "sft": ("sft", "evaluate"),
    "evaluate": ("evaluate",),
}
FAKES = dict.fromkeys(VERSIONS, "fake_stage")
FAKES_FOLDER = Path(__file__).parent.parent / "stages" / "fakes"

# What a field decides, by the longest beginning of its name that is here; written down from what the fields say.
DECIDES = {
    "seed": ALL,
    "data.world": ALL,
    "data.n_stories": ALL,
    "data.n_val_stories": ALL,
    "data.pack": ALL[1:],
    "data.seq_len": ("tokenize_sft", "pretrain", "sft", "evaluate"),  # a stream is cut when it is read
    "tokenizer": ALL[1:],
    "model": AFTER["pretrain"],
    "train": AFTER["pretrain"],
    "pretrain": AFTER["pretrain"],
    "sft": AFTER["tokenize_sft"],
    "sft.enabled": ALL[1:],  # without it no end-of-text token is needed
    "sft.train": AFTER["sft"],
    "eval": AFTER["evaluate"],
    "eval.batch_size": (),
    **{f"{section}.{name}": () for section in ("train", "sft.train") for name in (
        "guards", "eval_every", "eval_rows", "checkpoint_every", "checkpoint_seconds", "keep_checkpoints", "log_every",
        "sample_tokens",
    )},
    **dict.fromkeys(("name", "root", "launcher", "launch", "gate", "publish"), ()),
}  # fmt: skip

# Fields that go only with others: here with what they need. None: a file's bytes count; see below and test_plan.
WITH = {
    "data.source": None,
    "data.path": None,
    "data.url": None,
    "data.size": None,
    "data.sha256": None,
    "data.val_fraction": None,
    "tokenizer.name": None,
    "tokenizer.kind": ["tokenizer.kind=char"],
    "tokenizer.vocab_size": None,
    "pretrain.init_from": None,
    "pretrain.init_optimizer": None,
    "sft.source": None,
    "sft.path": None,
    "sft.template": ["sft.template='Q: {prompt} A: '"],
    "sft.seq_len": ["sft.seq_len=64"],
    "model.rope_scaling": ["model.rope_scaling={factor: 2.0}"],
    "model.vocab_size": None,
    "model.n_heads": ["model.n_heads=2"],
    "model.d_model": ["model.d_model=64"],
    "model.norm_bias": ["model.norm=layer", "model.norm_bias=true"],
    "model.zero_init_head": ["model.tie_embeddings=false", "model.zero_init_head=true"],
    "train.grad_accum_steps": ["train.grad_accum_steps=2"],
    "sft.train.grad_accum_steps": ["sft.train.grad_accum_steps=2"],
    "launch.stages": ["launch.stages=[pretrain]"],
    "launch.slurm.time_limit": ["launch.slurm.time_limit='1:00'"],
    "launch.kubernetes.cpu": ["launch.kubernetes.cpu=8"],
    "launch.kubernetes.memory": ["launch.kubernetes.memory=8Gi"],
    **{f"launch.kubernetes.{name}": [
        "launch.kubernetes.accelerator=nvidia.com/gpu", "launch.kubernetes.accelerator_count=1",
    ] for name in ("accelerator", "accelerator_count")},
    "launch.kubernetes.namespace": ["launch.kubernetes.namespace=ml"],
    "launch.kubernetes.mount_path": ["launch.kubernetes.mount_path=/x"],
    "launch.kubernetes.node_selector": ["launch.kubernetes.node_selector=[a=b]"],
    "gate.bounds": ["gate.bounds=[val_loss<=1]"],
    **{f"{section}.guards.{name}": [f"{section}.guards.{name}=9"]
       for section in ("train", "sft.train") for name in ("spike_factor", "hang_factor")},
}  # fmt: skip


def fields(model, before=""):
    """Every field that is no section, by its name with the sections' in front."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, Frozen):
            yield from fields(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value, field


def other(value, field):
    """Another value than the default, as YAML."""
    choices = [item for item in get_args(field.annotation) if isinstance(item, str)]
    if choices:
        return next(item for item in choices if item != value)
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return str(value / 2 if value else 0.5)
    if isinstance(value, str):
        return "other"
    if isinstance(value, tuple):
        return "[other]"
    return "other" if str in get_args(field.annotation) else "4"  # empty by default


def decided_by(name):
    parts = name.split(".")
    beginnings = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next(DECIDES[each] for each in beginnings if each in DECIDES)


def test_each_field_invalidates_exactly_the_stages_that_it_decides(tmp_path):
    file = tmp_path / "walk.yaml"
    file.write_text("")
    before = {spec.stage: spec.id for spec in plan(load(file))}
    wrong, walked = {}, 0
    for name, value, field in fields(RunConfig()):
        overrides = WITH.get(name, [f"{name}={other(value, field)}"])
        if overrides is None:
            continue
        try:
            after = {spec.stage: spec.id for spec in plan(load(file, overrides))}
        except InputError as error:
            wrong[name] = str(error)  # a new field: it needs a line in WITH
            continue
        changed = tuple(stage for stage in ALL if before.get(stage) != after.get(stage))
        walked += 1
        if changed != decided_by(name):
            wrong[name] = changed
    assert wrong == {}
    assert walked > 100


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(override...) -> the stages that a run with these settings has done, and not found done."""
    monkeypatch.syspath_prepend(str(FAKES_FOLDER))

    def run(*overrides):
        cfg = load(tmp_path / "walk.yaml", overrides).replace(root=str(tmp_path), launcher="inline")
        done = run_chain(cfg, modules=FAKES, echo=lambda line: None)
        return tuple(manifest.stage for manifest, cached in done if not cached)

    (tmp_path / "walk.yaml").write_text("")
    return run


def test_a_run_does_what_has_changed_and_what_comes_after_it(made, monkeypatch):
    assert made() == ALL
    assert made() == ()
    for override, stages in [
        ("seed=1", ALL),
        ("tokenizer.unk=false", AFTER["tokenize"]),
        ("sft.n_examples=5", AFTER["tokenize_sft"]),
        ("train.learning_rate=0.5", AFTER["pretrain"]),
        ("sft.train.steps=7", AFTER["sft"]),
        ("eval.n_questions=5", AFTER["evaluate"]),
        ("train.log_every=1", ()),
        ("name=other", ()),
    ]:
        assert made(override) == stages, override
        assert made(override) == (), override
    assert made() == ()  # what was made first is there still
    for stage in reversed(ALL):  # one after another: each raises what the stages before it have not
        with monkeypatch.context() as patch:
            patch.setitem(VERSIONS, stage, 99)
            assert made() == AFTER[stage], stage
            assert made() == (), stage
    assert made() == ()


def test_one_byte_of_the_input_is_enough(made, tmp_path):
    text = tmp_path / "text.txt"
    settings = ["data.source=file", f"data.path={text}", "sft.enabled=false"]
    stages = ("download", "tokenize", "pretrain", "evaluate")
    text.write_text("once upon a time")
    assert made(*settings) == stages
    text.write_text("once upon a lime")
    assert made(*settings) == stages
    text.write_text("once upon a time")
    assert made(*settings) == ()
    text.rename(tmp_path / "elsewhere.txt")  # its name is no part of it
    assert made(settings[0], f"data.path={tmp_path / 'elsewhere.txt'}", settings[2]) == ()
