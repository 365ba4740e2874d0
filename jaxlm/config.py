"""Every option of jaxlm: its type, default, range and one-line meaning. Loads no jax.

A run is one `RunConfig`. It comes from a YAML file plus `--set a.b=c` overrides (`load`), or is built in Python.
All models are frozen and hashable, so they serve as static arguments of jitted functions.

A field marked `cosmetic(...)` does not decide any result (log intervals, paths): it stays out of a stage's identity.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from jaxlm._frozen import Fraction, Frozen, NonNegative, Positive, cosmetic, validated
from jaxlm.errors import InputError
from jaxlm.guards_config import GuardOptions
from jaxlm.launch_config import FlowOptions
from jaxlm.model_config import ModelConfig, RopeScaling

__all__ = [
    "DataConfig", "EvalConfig", "Frozen", "ModelConfig", "PretrainConfig", "RopeScaling", "RunConfig", "SftConfig",
    "TokenizerConfig", "TrainConfig", "TrainOptions", "find_config", "load", "validated",
]  # fmt: skip


class TrainOptions(Frozen):
    """How parameters are fitted: batch, optimizer, schedule, and how often to look."""

    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(16, description="rows of seq_len tokens per step, over all devices")
    grad_accum_steps: Positive = Field(1, description="microbatches per step, run one after another")

    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for the matrices, Adam for the rest")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate of AdamW, or of Adam beside Muon")
    muon_learning_rate: float = Field(0.02, gt=0, description="peak rate of Muon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of the weights marked so in the weight table")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up from zero")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps spent in the final decay")
    final_lr_ratio: Fraction = Field(0.1, description="last rate over the peak rate")

    loss_chunk: NonNegative = Field(0, description="tokens per chunk of the cross-entropy; 0: all logits at once")
    on_nonfinite: Literal["halt", "skip"] = Field("halt", description="what a non-finite loss or gradient does")
    max_skips: Positive = Field(20, description="with on_nonfinite=skip: more skipped steps than this end the run")
    guards: GuardOptions = cosmetic(GuardOptions(), description="when to give up on a run that goes wrong")

    eval_every: NonNegative = cosmetic(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_rows: NonNegative = cosmetic(0, ge=0, description="validation rows per evaluation during training; 0: all")
    checkpoint_every: NonNegative = cosmetic(0, ge=0, description="steps between checkpoints; 0: by time alone")
    checkpoint_seconds: float = cosmetic(60.0, gt=0, description="save when this long since the last checkpoint")
    keep_checkpoints: Positive = cosmetic(2, gt=0, description="newest checkpoints kept, beside the best")
    log_every: Positive = cosmetic(10, gt=0, description="steps between lines of metrics.jsonl")
    sample_tokens: NonNegative = cosmetic(
        48, ge=0, description="length of the text sampled at each evaluation; 0: none"
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"grad_accum_steps={self.grad_accum_steps} must divide batch_size={self.batch_size}")
        return self


class TrainConfig(TrainOptions):
    """What `jaxlm.train` needs: the options and the model they are for."""

    model: ModelConfig = ModelConfig()


class DataConfig(Frozen):
    """Where the text comes from and how it is cut into rows."""

    source: str = Field("storyworld", description="storyworld, a name from jaxlm.data.sources, or file")
    path: str | None = Field(
        None, description="source=file: a UTF-8 text file (or .jsonl with a text field), or a directory"
    )
    url: str | None = Field(None, description="source=file: fetch it from here instead of path")
    size: Positive | None = Field(None, description="bytes of the download at url")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="digest of the file")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="last share of the characters kept for validation")
    world: Literal["small", "rich"] = Field("small", description="storyworld: which world")
    n_stories: Positive = Field(20000, description="storyworld: training stories")
    n_val_stories: Positive = Field(500, description="storyworld: validation stories")
    pack: Literal["stream", "documents"] = Field(
        "stream", description="documents: no row attends across a document's edge"
    )
    seq_len: Positive = Field(128, description="T, tokens per row")

    @model_validator(mode="after")
    def _source_fits(self) -> Self:
        if self.source == "file" and (self.path is None) == (self.url is None):
            raise ValueError("source=file needs one of path and url")
        if self.source != "file" and (self.path is not None or self.url is not None):
            raise ValueError(f"path and url belong to source=file, not to source={self.source}")
        if self.url is not None and (self.sha256 is None or self.size is None):
            raise ValueError("url needs size and sha256, so that what arrives can be checked")
        return self


class TokenizerConfig(Frozen):
    """Which tokenizer, and how it is made from the training text."""

    kind: Literal["char", "word", "bpe", "named"] = Field(
        "word", description="named: a published encoding or a directory"
    )
    name: str | None = Field(None, description="kind=named: gpt2, cl100k_base, a directory or a tokenizer.json")
    vocab_size: Positive = Field(4096, description="kind=bpe: merges are learned up to this size")
    unk: bool = Field(True, description="kind=char or word: unknown pieces become [UNK]; false: they are an error")

    @model_validator(mode="after")
    def _name_fits(self) -> Self:
        if (self.kind == "named") != (self.name is not None):
            raise ValueError("name goes with kind=named, and only with it")
        return self


class PretrainConfig(Frozen):
    """Where pretraining starts from."""

    init_from: str | None = Field(
        None, description="a run, a stage directory or a checkpoint to start from; empty: scratch"
    )
    init_optimizer: bool = Field(False, description="take the optimizer state along with the parameters")


class SftConfig(Frozen):
    """Supervised fine-tuning on prompt/response pairs; the loss counts response tokens only."""

    enabled: bool = Field(True, description="false: the pipeline ends after pretraining and its evaluation")
    source: str = Field("storyworld", description="storyworld questions, a name from jaxlm.data.sources, or file")
    path: str | None = Field(
        None, description="source=file: .jsonl or .json of prompt/response, instruction/output or messages"
    )
    n_examples: Positive = Field(8000, description="storyworld: questions to train on")
    seq_len: Positive | None = Field(None, description="T, tokens per packed row; empty: data.seq_len")
    template: str = Field("{prompt} ", description="text before the response; {prompt} is replaced")
    train: TrainOptions = TrainOptions()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.source == "file") != (self.path is not None):
            raise ValueError("path goes with source=file, and only with it")
        if "{prompt}" not in self.template:
            raise ValueError("template must contain {prompt}")
        return self


class EvalConfig(Frozen):
    """What the evaluation measures."""

    batch_size: Positive = cosmetic(32, gt=0, description="rows per evaluation batch")
    n_questions: Positive = Field(400, description="held-out questions asked, over all types")
    max_new_tokens: Positive = Field(16, description="longest answer")
    n_samples: NonNegative = Field(4, description="texts sampled for the report")
    sample_tokens: Positive = Field(80, description="length of each sampled text")
    temperature: float = Field(0.8, ge=0, description="of the samples; questions are answered greedily")
    top_p: Fraction = Field(0.95, description="of the samples")


class RunConfig(FlowOptions):
    """One run of the pipeline."""

    name: str = cosmetic("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names runs/<name>")
    root: str = cosmetic(".", description="directory that holds store/ and runs/")
    launcher: Literal["process", "inline"] = cosmetic(
        "process", description="inline: run stages in the calling process"
    )
    seed: NonNegative = Field(0, lt=2**32, description="decides initialisation, data order, dropout and samples")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    train: TrainOptions = TrainOptions()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and "preset" in value:
            from jaxlm.presets import preset

            overrides = {str(key): item for key, item in value.items() if key != "preset"}
            return preset(str(value["preset"]), **overrides)
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model.kind == "transformer" and self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len={self.data.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        if self.sft.enabled and self.model.kind == "transformer" and (self.sft.seq_len or 0) > self.model.max_seq_len:
            raise ValueError(f"sft.seq_len={self.sft.seq_len} is above model.max_seq_len={self.model.max_seq_len}")
        if self.sft.enabled and self.sft.source == "storyworld" and self.data.source != "storyworld":
            raise ValueError(
                f"sft.source=storyworld needs data.source=storyworld, found {self.data.source}; "
                "set sft.enabled=false or another sft.source"
            )
        return self


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads a YAML file and applies `a.b=c` overrides (values are parsed as YAML).

    Args:
        path: the file. A bare name such as `quickstart` also finds `configs/quickstart.yaml`.
        overrides: strings such as `train.steps=500`.

    Raises:
        InputError: no such file, not YAML, an unknown key, a value out of range, fields that do not fit together.
    """
    file = find_config(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise InputError(f"{file}: not a readable YAML file ({' '.join(str(error).split())}); fix the file.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a mapping of sections at the top, found {type(values).__name__}.")
    values.setdefault("name", file.stem)
    for override in overrides:
        _apply_override(values, override)
    return validated(RunConfig, values, where=str(file))


def find_config(path: str | Path) -> Path:
    """The file for a path or for the bare name of a checked-in config.

    Raises:
        InputError: neither exists.
    """
    file = Path(path)
    if file.is_file():
        return file
    if os.sep not in str(path) and not file.suffix:
        here = Path(__file__).resolve().parent
        # Beside the package in a checkout, inside it in an installed wheel.
        for folder in (Path("configs"), here.parent / "configs", here / "_configs"):
            if (folder / f"{path}.yaml").is_file():
                return folder / f"{path}.yaml"
    raise InputError(f"{path}: no such configuration file; pass a path to a YAML file such as configs/quickstart.yaml.")


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected section.field=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not readable as YAML; quote it.") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):
            value = float(value)
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: {parent} is not a section.")
        node[parent] = dict(child)  # a copy: two sections of a file with anchors may be one object
        node = node[parent]
    node[last] = value
